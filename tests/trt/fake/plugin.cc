// A plugin library that takes any kernels.

extern "C" __attribute__((visibility("default"))) int ligerexport_load_kernels(const char*) { return 0; }
