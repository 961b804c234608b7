// Defines symbols that newer compilers and C libraries would import, so that the library loads with
// glibc 2.28 and the libstdc++ of GCC 8. Linked in by -DSPARSE_FMHA_MANYLINUX=ON; tools/release.py
// checks the result.
//
// A linker takes the newest version of a symbol. Each function below jumps to the oldest one, which
// every glibc still has: most changed in name only, when glibc 2.34 merged its libraries.
#include <ios>
#include <new>

#if defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#define DLMOPEN "GLIBC_2.3.4"
#define JUMP "jmp "
#define PLT "@PLT"
#elif defined(__aarch64__)
#define OLDEST "GLIBC_2.17"
#define DLMOPEN "GLIBC_2.17"
#define JUMP "b "
#define PLT ""
#else
#error "manylinux wheels are built for x86-64 and aarch64"
#endif

// clang-format off
#define TAKE(name, version)                                \
  __asm__(".symver oldest_" #name ", " #name "@" version   \
          "\n.text\n.globl " #name "\n.hidden " #name      \
          "\n.type " #name ", %function\n" #name ":\n"     \
          JUMP "oldest_" #name PLT "\n.size " #name ", . - " #name "\n");
// clang-format on

TAKE(exp, OLDEST)
TAKE(exp2, OLDEST)
TAKE(log, OLDEST)
TAKE(log2, OLDEST)
TAKE(pow, OLDEST)
TAKE(dlclose, OLDEST)
TAKE(dlerror, OLDEST)
TAKE(dlmopen, DLMOPEN)
TAKE(dlopen, OLDEST)
TAKE(dlsym, OLDEST)
TAKE(dlvsym, OLDEST)
TAKE(pthread_condattr_setpshared, OLDEST)
TAKE(pthread_create, OLDEST)
TAKE(pthread_detach, OLDEST)
TAKE(pthread_getspecific, OLDEST)
TAKE(pthread_join, OLDEST)
TAKE(pthread_key_create, OLDEST)
TAKE(pthread_key_delete, OLDEST)
TAKE(pthread_kill, OLDEST)
TAKE(pthread_mutex_trylock, OLDEST)
TAKE(pthread_mutexattr_destroy, OLDEST)
TAKE(pthread_mutexattr_init, OLDEST)
TAKE(pthread_mutexattr_setpshared, OLDEST)
TAKE(pthread_mutexattr_settype, OLDEST)
TAKE(pthread_once, OLDEST)
TAKE(pthread_rwlock_destroy, OLDEST)
TAKE(pthread_rwlock_init, OLDEST)
TAKE(pthread_rwlock_rdlock, OLDEST)
TAKE(pthread_rwlock_timedrdlock, OLDEST)
TAKE(pthread_rwlock_timedwrlock, OLDEST)
TAKE(pthread_rwlock_tryrdlock, OLDEST)
TAKE(pthread_rwlock_trywrlock, OLDEST)
TAKE(pthread_rwlock_unlock, OLDEST)
TAKE(pthread_rwlock_wrlock, OLDEST)
TAKE(pthread_rwlockattr_destroy, OLDEST)
TAKE(pthread_rwlockattr_init, OLDEST)
TAKE(pthread_rwlockattr_setpshared, OLDEST)
TAKE(pthread_setspecific, OLDEST)
TAKE(pthread_spin_destroy, OLDEST)
TAKE(pthread_spin_init, OLDEST)
TAKE(pthread_spin_lock, OLDEST)
TAKE(pthread_spin_trylock, OLDEST)
TAKE(pthread_spin_unlock, OLDEST)
TAKE(sem_destroy, OLDEST)
TAKE(sem_init, OLDEST)
TAKE(sem_post, OLDEST)
TAKE(sem_timedwait, OLDEST)
TAKE(sem_trywait, OLDEST)
TAKE(sem_wait, OLDEST)
TAKE(shm_open, OLDEST)
TAKE(shm_unlink, OLDEST)

#define HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32: whether reference counts may do without atomic instructions. Here they never do.
extern "C" HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;

// GCC 12 declares these two members of std::exception_ptr in headers. Before, copying and
// destroying one were runtime functions, which do the same.
using ExceptionPtr = void*;
extern "C" void copy_exception_ptr(ExceptionPtr* to, ExceptionPtr const* from) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
extern "C" void destroy_exception_ptr(ExceptionPtr*) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrD1Ev");
extern "C" HIDDEN void add_reference(ExceptionPtr*) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
extern "C" HIDDEN void release(ExceptionPtr*) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void add_reference(ExceptionPtr* self) {
  ExceptionPtr copy;  // never destroyed, so its reference is kept
  copy_exception_ptr(&copy, self);
}
void release(ExceptionPtr* self) { destroy_exception_ptr(self); }

// GCC 11: called by a new[] of a negative length.
extern "C" HIDDEN void throw_bad_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");

void throw_bad_length() { throw std::bad_array_new_length(); }

// GCC 9: string stream constructors without arguments, separate from those with a mode.
extern "C" void open_output(void* self, int mode) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1ESt13_Ios_Openmode");
extern "C" void open_stream(void* self, int mode) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1ESt13_Ios_Openmode");
extern "C" HIDDEN void make_output(void* self) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
extern "C" HIDDEN void make_stream(void* self) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");

void make_output(void* self) { open_output(self, std::ios_base::out); }
void make_stream(void* self) { open_stream(self, std::ios_base::in | std::ios_base::out); }
