#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr std::size_t kGuardBytes = 4096;
// Instrumented code keeps more on the stack.
constexpr std::size_t kStackBytes = 256 << 10;

Fiber* leaving = nullptr;
Fiber* arriving = nullptr;

#if EMULATOR_HAS_ASSEMBLY_SWITCH
// Saves what the System V ABI asks a callee to keep, changes stacks, and restores the same.
__attribute__((naked, noinline, no_sanitize("address", "undefined"))) void swap_stacks(void** /*from*/, void* /*to*/) {
  __asm__(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
constexpr int kSavedRegisters = 6;
#endif

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_ - kGuardBytes, kStackBytes + kGuardBytes);
}

void Fiber::allocate_stack() {
  void* const pages = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  mprotect(pages, kGuardBytes, PROT_NONE);  // an overflow faults instead of corrupting
  stack_ = static_cast<char*>(pages) + kGuardBytes;
  stack_bytes_ = kStackBytes;
  sanitized_stack_ = stack_;
  sanitized_bytes_ = kStackBytes;
}

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) allocate_stack();
  entry_ = entry;
  fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, stack_bytes_);
#endif
#if EMULATOR_HAS_ASSEMBLY_SWITCH
  // What swap_stacks pops: registers, then begin() as the address to return to. The null above it leaves the stack
  // as after a call, 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#endif
}

void Fiber::begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &leaving->sanitized_stack_, &leaving->sanitized_bytes_);
#endif
  arriving->entry_();
}

void Fiber::switch_between(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
  leaving = &from;
  arriving = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack_, to.sanitized_stack_, to.sanitized_bytes_);
#endif
#if EMULATOR_HAS_ASSEMBLY_SWITCH
  swap_stacks(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, &leaving->sanitized_stack_, &leaving->sanitized_bytes_);
#endif
}

}  // namespace emulator
