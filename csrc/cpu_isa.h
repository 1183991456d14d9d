// The instruction sets that the CPU code is compiled for, best first; one is chosen at run time.
#pragma once

#include <string>

namespace exaonepath {

template <typename Functions>
struct Isa {
  const char* name;
  bool (*supported)();
  Functions functions;
};

// The compiler's check covers the operating system too, which has to save the wider registers.
#if defined(EXAONEPATH_X86_64)
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
inline bool always() { return true; }

// The best of `isas` for an empty name, or the one of that name; null if this CPU or build does not have it.
template <typename Functions, std::size_t N>
const Functions* find_isa(const Isa<Functions> (&isas)[N], const std::string& name) {
  for (const Isa<Functions>& isa : isas) {
    if ((name.empty() || name == isa.name) && isa.supported()) return &isa.functions;
  }
  return nullptr;
}

}  // namespace exaonepath
