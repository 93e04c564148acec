"""A page in the browser and an HTTP service, of the extras `demo` and `serve`."""
