// Lets a CPU build of torch make and move tensors that say they are on a GPU.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using c10::impl::NoOpDeviceGuardImpl;
struct CudaGuard final : NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {};
struct MpsGuard final : NoOpDeviceGuardImpl<c10::DeviceType::MPS> {};
C10_REGISTER_GUARD_IMPL(CUDA, CudaGuard)
C10_REGISTER_GUARD_IMPL(MPS, MpsGuard)
}  // namespace
