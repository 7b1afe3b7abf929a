// What a compiler newer than glibc 2.28 asks for that systems of its age have not, for wheels (VIMAMBA_MANYLINUX in
// CMakeLists.txt). Whether anything else is needed, auditwheel says when it names the wheel.

#include <cxxabi.h>

#include <new>
#include <sstream>

extern "C" {
// libstdc++ asks it before it counts references (glibc 2.32): there may be several threads.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// It went from libdl to libc in 2.34, which has it under the old version too; --wrap sends every call here.
#if defined(__x86_64__)
__asm__(".symver old_dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver old_dlsym, dlsym@GLIBC_2.17");
#else
#error "VIMAMBA_MANYLINUX: the first version of dlsym on this machine is not written here"
#endif
void* old_dlsym(void* library, const char* name);
void* __wrap_dlsym(void* library, const char* name) { return old_dlsym(library, name); }
}

// Members of libstdc++ that are younger than GCC 8: a copy of our own.
void std::__throw_bad_array_new_length() { abi::__cxa_throw_bad_array_new_length(); }
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
