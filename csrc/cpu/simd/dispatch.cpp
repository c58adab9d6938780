#include "cpu/simd/dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hmi {
namespace {

struct Level {
  const SimdKernels* kernels;
  bool (*is_supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

constexpr Level kLevels[] = {
    {&portable_kernels, always},
#if defined(__x86_64__)
    {&avx2_kernels, has_avx2},
    {&avx512_kernels, has_avx512},
#endif
};

const SimdKernels* highest_supported() {
  const SimdKernels* highest = nullptr;
  for (const Level& level : kLevels) {
    if (level.is_supported()) highest = level.kernels;
  }
  return highest;
}

std::atomic<const SimdKernels*>& active() {
  static std::atomic<const SimdKernels*> kernels{highest_supported()};
  return kernels;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> compiled_simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) names.push_back(level.kernels->name);
  return names;
}

std::vector<std::string> available_simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.is_supported()) names.push_back(level.kernels->name);
  }
  return names;
}

void set_simd_level(const std::string& name) {
  if (name == "auto") return active().store(highest_supported());
  for (const Level& level : kLevels) {
    if (name == level.kernels->name && level.is_supported()) return active().store(level.kernels);
  }
  throw std::invalid_argument("SIMD level " + name + " is not to be had: this machine runs " +
                              joined(available_simd_levels()) + " (compiled: " + joined(compiled_simd_levels()) +
                              "), or auto");
}

const SimdKernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

}  // namespace hmi
