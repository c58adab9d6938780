// Blocks of expensive memory (page-locked), kept for reuse under a budget of bytes.
//
// A block is an allocation of its own, of one of the sizes of block_size(). What is given back stays cached for the next
// request of its size; when the budget is full, cached blocks of other sizes are freed for good, oldest first. As no two
// blocks share an allocation, any block can be freed: whatever the history, a request fails only if its block and those
// in use exceed the budget together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace hmi {

// Where blocks come from. The functions may be called from any thread, one at a time for one pool.
struct BlockAllocator {
  void* (*allocate)(size_t bytes);  // throws what tells best why it cannot
  void (*release)(void* address) noexcept;
  // Makes memory that exists as good as a block.
  void (*enlist)(void* address, size_t bytes, bool is_read_only);
  void (*discharge)(void* address) noexcept;
  bool is_pinned;
};

// Ordinary memory, aligned to pages; to enlist is to do nothing.
const BlockAllocator& plain_allocator();

class PoolClosed : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
class PoolExhausted : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Multiples of a page (4 KiB, the unit of page-locking) up to 64 KiB, then eight sizes to each power of two: from 32 KiB
// on at most an eighth more than asked.
size_t block_size(size_t bytes);

class Block;

// Thread-safe. Blocks keep their pool alive.
class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  BlockPool(size_t budget_bytes, const BlockAllocator& allocator) : budget_bytes_(budget_bytes), allocator_(allocator) {}
  ~BlockPool() { close(); }
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // Throws PoolClosed, PoolExhausted, or what the allocator throws after all cached blocks were freed in vain.
  std::unique_ptr<Block> allocate(size_t bytes);

  // Enlists memory until close(); it counts as in use. Throws as allocate() does.
  void enlist(void* address, size_t bytes, bool is_read_only);

  // Frees cached blocks and discharges enlisted memory; blocks in use stay valid and are freed when they are dropped.
  void close() noexcept;

  bool is_closed() const;
  size_t bytes_in_use() const;    // blocks at their full size, and enlisted memory
  size_t bytes_reserved() const;  // those and cached blocks: never above the budget
  size_t budget_bytes() const { return budget_bytes_; }
  bool is_pinned() const { return allocator_.is_pinned; }

 private:
  friend class Block;
  struct CachedBlock {
    void* address;
    uint64_t cached_at;
  };

  void give_back(void* address, size_t bytes) noexcept;
  void* allocate_new(size_t bytes);
  void make_room(size_t bytes, size_t asked);
  void require_open() const;
  void release_oldest() noexcept;

  const size_t budget_bytes_;
  const BlockAllocator allocator_;
  mutable std::mutex mutex_;  // guards what follows
  std::map<size_t, std::deque<CachedBlock>> cached_;  // by size, oldest first; no empty entries
  std::map<void*, size_t> enlisted_;
  uint64_t num_cached_ = 0;  // ever: a clock
  size_t bytes_in_use_ = 0;
  size_t bytes_cached_ = 0;
  bool is_closed_ = false;
};

// Goes back to its pool when it dies.
class Block {
 public:
  Block(std::shared_ptr<BlockPool> pool, void* address, size_t bytes, size_t block_bytes)
      : pool_(std::move(pool)), address_(address), bytes_(bytes), block_bytes_(block_bytes) {}
  ~Block() { pool_->give_back(address_, block_bytes_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* address() const { return address_; }
  size_t bytes() const { return bytes_; }  // as asked for

 private:
  std::shared_ptr<BlockPool> pool_;
  void* address_;
  size_t bytes_;
  size_t block_bytes_;
};

}  // namespace hmi
