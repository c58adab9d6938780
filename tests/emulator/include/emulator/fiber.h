// A flow of control with a stack of its own: every CUDA thread of a block is one, and the host that launches is one.
// Only one runs at a time; it goes on until it hands over to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_HAS_ASSEMBLY_SWITCH 0
#include <ucontext.h>
#else
#define EMULATOR_HAS_ASSEMBLY_SWITCH 1
#endif

namespace emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // The next switch to this fiber calls entry on an empty stack; entry must never return. What the fiber was doing
  // before is forgotten, without destructors.
  void prepare(void (*entry)());

  // Suspends the fiber that runs, from, and goes on with to. for_good: nobody will switch back to from.
  static void switch_between(Fiber& from, Fiber& to, bool for_good = false);

  // Whether the address lies on this fiber's stack. The host's fiber has no stack of its own.
  bool owns(const void* address) const {
    return static_cast<std::size_t>(static_cast<const char*>(address) - stack_) < stack_bytes_;
  }

 private:
  void allocate_stack();
  static void begin();

  char* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  void (*entry_)() = nullptr;
#if EMULATOR_HAS_ASSEMBLY_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  // AddressSanitizer must be told which stack is in use: that of a thread of the system for the host's fiber.
  void* fake_stack_ = nullptr;
  const void* sanitized_stack_ = nullptr;
  std::size_t sanitized_bytes_ = 0;
};

}  // namespace emulator
