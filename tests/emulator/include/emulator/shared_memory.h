// The shared memory of the running block: NaN at the block's start, since hardware promises nothing.
#pragma once

#include <cstddef>

namespace emulator {

// Dynamic shared memory of the launch that runs.
unsigned char* dynamic_shared();
bool is_shared(const void* address, std::size_t bytes);
bool is_dynamic_shared(const void* address);

void begin_launch_shared(std::size_t bytes);
void begin_block_shared();
// Ends the launch with an error if the kernel wrote past its dynamic shared memory.
void end_block_shared();
void end_launch_shared();

// Marks a static array as used by the running block; the first use makes it NaN.
void use_static_shared(void* address, std::size_t bytes);

template <class T>
struct SharedVariable {
  alignas(128) unsigned char storage[sizeof(T)];

  T& use() {
    use_static_shared(storage, sizeof(T));
    return *reinterpret_cast<T*>(storage);
  }
};

}  // namespace emulator
