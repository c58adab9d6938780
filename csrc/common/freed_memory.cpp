#include "common/freed_memory.h"

#include <cstdlib>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace hmi {

bool keep_freed_memory() noexcept {
#if defined(__GLIBC__)
  constexpr int kMostFromHeap = 32 << 20;  // glibc takes no more
  constexpr int kMostKept = 256 << 20;
  return mallopt(M_MMAP_THRESHOLD, kMostFromHeap) == 1 && mallopt(M_TRIM_THRESHOLD, kMostKept) == 1;
#else
  return false;
#endif
}

}  // namespace hmi
