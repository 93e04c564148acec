"""Looks at the machine, the device, the kernels and a model, for `tadsr doctor`."""

from tadsr.doctor.children import check_all, time_all
from tadsr.doctor.findings import Finding, Report, examine
