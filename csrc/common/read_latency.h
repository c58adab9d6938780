// A slower disk than the machine has, for tests and benchmarks only.
#pragma once

#include <cstdint>

namespace hmi {

// From now on every read_file() of the process takes so much longer, as if there were one disk that answers after
// seconds_per_read and then delivers bytes_per_second. Reads at the same time wait for their answers together, and
// share the bandwidth: their bytes come one read after the other. 0 seconds and infinitely many bytes a second, as at
// the start, add nothing. Thread-safe; reads that are asleep sleep on. Throws std::invalid_argument unless
// seconds_per_read is 0 to 3600 and bytes_per_second 1 or more.
void set_read_latency(double seconds_per_read, double bytes_per_second);

// What read_file() calls in the thread that has read so many bytes.
void sleep_as_slower_disk(int64_t bytes) noexcept;

}  // namespace hmi
