// What a library says of itself, before anything else of it is used.

#include "xla/ffi/api/c_api.h"

extern "C" {

// Whether this CPU has the instructions that it was built for.
bool runs_here() {
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
