// What a library says of itself, before anything else of it is used.

#include <sys/syscall.h>
#include <unistd.h>

#include "xla/ffi/api/c_api.h"

namespace {

// Whether this process may use the memory of tiles, which Linux gives to those that ask: arch_prctl's
// ARCH_REQ_XCOMP_PERM, with XFEATURE_XTILEDATA. Threads that there are and that come have it, too.
[[maybe_unused]] bool may_use_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

}  // namespace

extern "C" {

// Whether this CPU has the instructions that it was built for.
bool runs_here() {
#ifdef __AMX_TILE__
  if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16") ||
      !__builtin_cpu_supports("amx-int8") || !may_use_tiles())
    return false;
#endif
#ifdef __AVX512BF16__
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
}

// The version of XLA's interface that it was built for: XLA refuses a later one than its own, and with it all of a CPU.
int interface() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// A digest of the sources that it was built from.
const char* sources() { return SOURCES; }
}
