// What GCC 11 and later take from a libstdc++ that is newer than that of manylinux_2_28. Each library has its own copy,
// as GCC's toolset for older systems does it.
#include <new>

#if defined(__GLIBCXX__) && __GNUC__ >= 11
namespace std {
[[noreturn]] __attribute__((visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
