// What malloc does with memory that nobody uses any more.
#pragma once

namespace hmi {

// From now on malloc keeps up to 256 MiB of freed memory for the next who asks, in each of its heaps, and takes blocks
// of up to 32 MiB from there. Tensors of a batch are freed after it and allocated again for the next; where malloc has
// given them back to the system meanwhile, every page of them is filled with zeros again. Changes nothing and returns
// false where malloc is not glibc's. Thread-safe.
bool keep_freed_memory() noexcept;

}  // namespace hmi
