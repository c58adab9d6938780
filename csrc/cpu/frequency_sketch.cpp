#include "cpu/frequency_sketch.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "common/ngram_key.h"

namespace hmi {
namespace {

constexpr int64_t kMaxShards = 16;
constexpr int64_t kLeastItemsPerShard = 1024;  // with fewer, chance alone would fill one shard well before the others
constexpr int64_t kFirstItems = 64;
constexpr int64_t kPurgedShare = 4;  // a purge frees one key in so many, or more
constexpr size_t kPrefetchDistance = 8;
constexpr int64_t kKeysPerChunk = 1 << 15;  // partitioned by shard at a time; they stay in the second-level cache

int64_t num_shards_for(int64_t max_items) {
  int64_t shards = 1;
  while (shards < kMaxShards && 2 * shards * kLeastItemsPerShard <= max_items) shards *= 2;
  return shards;
}

void require_positive(const char* name, double value) {
  if (!(value > 0) || !std::isfinite(value)) {
    throw std::invalid_argument(std::string(name) + " must be positive and finite, not " + std::to_string(value));
  }
}

void check_numbers(const int64_t* numbers, int64_t num_numbers, int64_t num_sequences) {
  for (int64_t i = 0; i < num_numbers; ++i) {
    if (numbers[i] < 0 || numbers[i] >= num_sequences) {
      throw std::invalid_argument("sequence_numbers[" + std::to_string(i) + "] is " + std::to_string(numbers[i]) +
                                  ", but there are " + std::to_string(num_sequences) + " sequences");
    }
  }
}

void check_token_ids(const PackedSequences& p, int64_t number) {
  const int32_t* end = p.input_ids + p.offsets[number + 1];
  const int32_t* bad = std::find_if_not(p.input_ids + p.offsets[number], end, is_token_id);
  if (bad != end) {
    throw std::invalid_argument("input_ids[" + std::to_string(bad - p.input_ids) + "] is " + std::to_string(*bad) +
                                ", but token ids lie in 0.." + std::to_string(kMaxTokenId));
  }
}

void append_windows(const int32_t* ids, int64_t length, int window, std::vector<int64_t>& keys) {
  for (int64_t t = 0; t + 1 < length; ++t) {
    keys.push_back(ngram_key(ids[t], ids[t + 1], kAbsent));
    if (window == 2) continue;
    keys.push_back(ngram_key(kAbsent, ids[t], ids[t + 1]));
    if (t + 2 < length) keys.push_back(ngram_key(ids[t], ids[t + 1], ids[t + 2]));
  }
}

}  // namespace

WeightTable::WeightTable(int64_t max_items)
    : max_items_(max_items), limit_(std::min(max_items, kFirstItems)), slots_(slots_for(limit_)) {}

// The slot takes the high bits of the mixed key, the shard the low ones.
size_t WeightTable::home(int64_t key) const {
  return static_cast<size_t>((static_cast<unsigned __int128>(mix_key(key)) * slots_.size()) >> 64);
}

KeyWeight& WeightTable::locate(int64_t key) {
  size_t position = home(key);
  while (slots_[position].key != key && slots_[position].key != 0) {
    if (++position == slots_.size()) position = 0;
  }
  return slots_[position];
}

void WeightTable::add(int64_t key, double weight, SpareSlots& spare) {
  KeyWeight* slot = &locate(key);
  if (slot->key == 0) {
    if (size_ == limit_) {
      make_room(spare);
      slot = &locate(key);
    }
    slot->key = key;
    ++size_;
  }
  slot->weight += weight;
}

void WeightTable::make_room(SpareSlots& spare) {
  const std::lock_guard<std::mutex> lock(spare.mutex);
  if (limit_ < max_items_) {
    rebuild(std::min(max_items_, 2 * limit_), 0, spare.slots);
    return;
  }
  const double subtracted = low_quantile(spare.slots);
  rebuild(limit_, subtracted, spare.slots);
  offset += subtracted;
}

double WeightTable::low_quantile(std::vector<KeyWeight>& scratch) const {
  scratch.clear();
  scratch.reserve(slots_.size());
  append_items(0, scratch);
  const auto quantile = scratch.begin() + size_ / kPurgedShare;
  std::nth_element(scratch.begin(), quantile, scratch.end(),
                   [](const KeyWeight& a, const KeyWeight& b) { return a.weight < b.weight; });
  return quantile->weight;
}

void WeightTable::rebuild(int64_t limit, double subtracted, std::vector<KeyWeight>& spare) {
  const size_t num_slots = slots_for(limit);
  if (spare.capacity() < num_slots) std::vector<KeyWeight>().swap(spare);  // never three arrays at once
  spare.assign(num_slots, KeyWeight{});
  spare.swap(slots_);
  limit_ = limit;
  size_ = 0;
  for (const KeyWeight& item : spare) {
    if (item.key == 0 || item.weight <= subtracted) continue;
    locate(item.key) = {item.key, item.weight - subtracted};
    ++size_;
  }
}

void WeightTable::scale(double factor) {
  for (KeyWeight& slot : slots_) slot.weight *= factor;
  total *= factor;
  offset *= factor;
}

void WeightTable::append_items(double min_weight, std::vector<KeyWeight>& items) const {
  for (const KeyWeight& item : slots_) {
    if (item.key != 0 && item.weight >= min_weight) items.push_back(item);
  }
}

void WeightTable::append_scattered(std::vector<KeyWeight>& items) const {
  const size_t num_slots = slots_.size();
  size_t stride = static_cast<size_t>(0.618 * static_cast<double>(num_slots)) | 1;
  while (std::gcd(stride, num_slots) != 1) stride += 2;
  for (size_t i = 0, position = 0; i < num_slots; ++i, position = (position + stride) % num_slots) {
    if (slots_[position].key != 0) items.push_back(slots_[position]);
  }
}

FrequencySketch::FrequencySketch(int64_t max_items) : max_items_(max_items) {
  if (max_items < 1) {
    throw std::invalid_argument("max_items must be positive, not " + std::to_string(max_items));
  }
  const int64_t num_shards = num_shards_for(max_items);
  for (int64_t i = 0; i < num_shards; ++i) shards_.push_back(std::make_unique<Shard>(max_items / num_shards));
}

size_t FrequencySketch::shard_of(int64_t key) const { return mix_key(key) & (shards_.size() - 1); }

void FrequencySketch::add(const int64_t* keys, int64_t count, double weight) {
  require_positive("weight", weight);
  const int64_t* bad = std::find_if(keys, keys + count, [](int64_t key) { return key < 0; });
  if (bad != keys + count) {
    throw std::invalid_argument("keys[" + std::to_string(bad - keys) + "] is " + std::to_string(*bad) +
                                ", but keys are positive, or 0 for none");
  }
  for (int64_t begin = 0; begin < count; begin += kKeysPerChunk) {
    add_by_shard({keys + begin, keys + std::min(count, begin + kKeysPerChunk)}, weight);
  }
}

void FrequencySketch::add_windows(const PackedSequences& sequences, const int64_t* numbers, int64_t num_numbers,
                                  int window, double weight) {
  require_positive("weight", weight);
  sequences.check();
  check_numbers(numbers, num_numbers, sequences.num_sequences);
  for (int64_t i = 0; i < num_numbers; ++i) check_token_ids(sequences, numbers[i]);
  std::vector<int64_t> keys;
  for (int64_t i = 0; i < num_numbers; ++i) {
    const int64_t begin = sequences.offsets[numbers[i]];
    append_windows(sequences.input_ids + begin, sequences.offsets[numbers[i] + 1] - begin, window, keys);
    if (static_cast<int64_t>(keys.size()) >= kKeysPerChunk || i + 1 == num_numbers) {
      add_by_shard(keys, weight);
      keys.clear();
    }
  }
}

void FrequencySketch::add_by_shard(const std::vector<int64_t>& keys, double weight) {
  const size_t num_shards = shards_.size();
  size_t begin[kMaxShards + 1] = {};
  for (const int64_t key : keys) begin[shard_of(key) + 1] += key != 0;
  for (size_t shard = 0; shard < num_shards; ++shard) begin[shard + 1] += begin[shard];
  size_t next[kMaxShards];
  std::copy_n(begin, num_shards, next);
  std::vector<int64_t> sorted(begin[num_shards]);
  for (const int64_t key : keys) {
    if (key != 0) sorted[next[shard_of(key)]++] = key;
  }
  for (size_t shard = 0; shard < num_shards; ++shard) {
    const size_t end = begin[shard + 1];
    if (begin[shard] == end) continue;
    const std::lock_guard<std::mutex> lock(shards_[shard]->mutex);
    WeightTable& table = shards_[shard]->table;
    for (size_t i = begin[shard]; i < end; ++i) {
      if (i + kPrefetchDistance < end) table.prefetch(sorted[i + kPrefetchDistance]);
      table.add(sorted[i], weight, spare_);
    }
    table.total += weight * static_cast<double>(end - begin[shard]);
  }
}

template <class Body>
void FrequencySketch::for_each_table(const Body& body) const {
  for (const auto& shard : shards_) {
    const std::lock_guard<std::mutex> lock(shard->mutex);
    body(shard->table);
  }
}

void FrequencySketch::merge(const FrequencySketch& other) {
  // Where the numbers of shards differ, a shard here holds keys of several shards there, or the other way round: those
  // of the same low bits.
  const size_t common = std::min(shards_.size(), other.shards_.size());
  std::vector<double> offsets(shards_.size(), 0.0);
  for (size_t theirs = 0; theirs < other.shards_.size(); ++theirs) {
    const TableCopy copy = other.copy_table(theirs);
    for (const KeyWeight& item : copy.items) {
      Shard& shard = *shards_[shard_of(item.key)];
      const std::lock_guard<std::mutex> lock(shard.mutex);
      shard.table.add(item.key, item.weight, spare_);
    }
    Shard& first = *shards_[theirs % common];
    const std::lock_guard<std::mutex> lock(first.mutex);
    first.table.total += copy.total;
    for (size_t ours = theirs % common; ours < shards_.size(); ours += common) {
      offsets[ours] = std::max(offsets[ours], copy.offset);
    }
  }
  size_t shard = 0;
  for_each_table([&](WeightTable& table) { table.offset += offsets[shard++]; });
}

FrequencySketch::TableCopy FrequencySketch::copy_table(size_t shard) const {
  const std::lock_guard<std::mutex> lock(shards_[shard]->mutex);
  const WeightTable& table = shards_[shard]->table;
  TableCopy copy{table.total, table.offset, {}};
  table.append_scattered(copy.items);
  return copy;
}

void FrequencySketch::scale(double factor) {
  require_positive("factor", factor);
  for_each_table([&](WeightTable& table) { table.scale(factor); });
}

void FrequencySketch::clear() {
  const int64_t items_per_shard = max_items_ / static_cast<int64_t>(shards_.size());
  for_each_table([&](WeightTable& table) { table = WeightTable(items_per_shard); });
  const std::lock_guard<std::mutex> lock(spare_.mutex);
  std::vector<KeyWeight>().swap(spare_.slots);
}

std::vector<KeyWeight> FrequencySketch::items(double min_weight) const {
  std::vector<KeyWeight> items;
  for_each_table([&](const WeightTable& table) { table.append_items(min_weight, items); });
  std::sort(items.begin(), items.end(), [](const KeyWeight& a, const KeyWeight& b) { return a.key < b.key; });
  return items;
}

int64_t FrequencySketch::size() const {
  int64_t size = 0;
  for_each_table([&](const WeightTable& table) { size += table.size(); });
  return size;
}

double FrequencySketch::total() const {
  double total = 0;
  for_each_table([&](const WeightTable& table) { total += table.total; });
  return total;
}

double FrequencySketch::max_error() const {
  double error = 0;
  for_each_table([&](const WeightTable& table) { error = std::max(error, table.offset); });
  return error;
}

int64_t FrequencySketch::memory_bytes() const {
  int64_t bytes = sizeof(*this) + shards_.size() * (sizeof(shards_[0]) + sizeof(Shard));
  for_each_table([&](const WeightTable& table) { bytes += table.memory_bytes(); });
  const std::lock_guard<std::mutex> lock(spare_.mutex);
  return bytes + static_cast<int64_t>(spare_.slots.capacity() * sizeof(KeyWeight));
}

int64_t FrequencySketch::max_memory_bytes(int64_t max_items) {
  const int64_t num_shards = num_shards_for(max_items);
  const int64_t table_bytes = WeightTable::slots_for(max_items / num_shards) * sizeof(KeyWeight);
  return sizeof(FrequencySketch) + num_shards * (sizeof(std::unique_ptr<Shard>) + sizeof(Shard)) +
         (num_shards + 1) * table_bytes;
}

}  // namespace hmi
