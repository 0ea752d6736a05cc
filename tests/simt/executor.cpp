#include "executor.h"

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtCollective, kDone };

struct SharedArray {
  std::unique_ptr<unsigned char[]> bytes;
  size_t size;
};

}  // namespace

struct Thread {
  dim3 index;
  int number = 0;
  State state = State::kReady;
  uint32_t mask = 0;
  Collective kind = Collective::kBarrier;
  uint64_t value = 0;
  std::array<uint64_t, 32> gathered{};
  ucontext_t context{};
  std::unique_ptr<unsigned char[]> stack;
  void* sanitizer_stack = nullptr;
};

namespace {

struct Block {
  dim3 index;
  dim3 size;
  dim3 grid;
  std::vector<Thread> threads;
  Thread* running = nullptr;
  ucontext_t scheduler{};
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_sanitizer_stack = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::map<std::pair<std::string, int>, SharedArray> shared;
  SharedArray dynamic_shared;
  unsigned char poison = 0;
  std::exception_ptr failure;
};

Block* current = nullptr;

SharedArray poisoned(size_t bytes, unsigned char poison) {
  SharedArray array{std::make_unique<unsigned char[]>(std::max<size_t>(bytes, 1)), bytes};
  std::memset(array.bytes.get(), poison, bytes);
  return array;
}

// The address sanitizer keeps a shadow of the stack it believes in: tell it of every switch.
void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                  [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}
void finish_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** stack,
                   [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, stack, size);
#endif
}

void yield_to_scheduler(bool last = false) {
  Thread* thread = current->running;
  start_switch(last ? nullptr : &thread->sanitizer_stack, current->scheduler_stack,
               current->scheduler_stack_size);
  swapcontext(&thread->context, &current->scheduler);
  finish_switch(thread->sanitizer_stack, &current->scheduler_stack, &current->scheduler_stack_size);
}

void thread_main() {
  finish_switch(nullptr, &current->scheduler_stack, &current->scheduler_stack_size);
  try {
    (*current->kernel)();
  } catch (...) {
    current->failure = std::current_exception();
  }
  current->running->state = State::kDone;
  yield_to_scheduler(true);
}

// Apart from the loop over threads, because getcontext may return twice.
[[gnu::noinline]] void prepare(Thread& thread) {
  // Not zeroed: that would touch all of it, for every thread of every block.
  thread.stack = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, thread_main, 0);
}

void resume(Thread& thread) {
  current->running = &thread;
  start_switch(&current->scheduler_sanitizer_stack, thread.stack.get(), kStackBytes);
  swapcontext(&current->scheduler, &thread.context);
  finish_switch(current->scheduler_sanitizer_stack, nullptr, nullptr);
}

// Lets the lanes of a complete collective go on: each gets what all of them brought.
bool release_collectives(Block& block) {
  bool released = false;
  for (Thread& thread : block.threads) {
    if (thread.state != State::kAtCollective) continue;
    const int first = thread.number / 32 * 32;
    std::array<uint64_t, 32> values{};
    bool complete = true;
    for (int i = 0; i < 32 && complete; ++i) {
      if (((thread.mask >> i) & 1u) == 0) continue;
      const size_t number = static_cast<size_t>(first + i);
      // Lanes past a block's last thread do not exist; hardware counts them as exited.
      if (number >= block.threads.size()) continue;
      const Thread& other = block.threads[number];
      complete = other.state == State::kAtCollective && other.mask == thread.mask &&
                 other.kind == thread.kind;
      values[static_cast<size_t>(i)] = other.value;
    }
    if (!complete) continue;
    for (int i = 0; i < 32; ++i) {
      const size_t number = static_cast<size_t>(first + i);
      if (((thread.mask >> i) & 1u) == 0 || number >= block.threads.size()) continue;
      block.threads[number].gathered = values;
      if (number != static_cast<size_t>(thread.number)) block.threads[number].state = State::kReady;
    }
    thread.state = State::kReady;
    released = true;
  }
  return released;
}

bool release_block_barrier(Block& block) {
  bool waiting = false;
  for (const Thread& thread : block.threads) {
    if (thread.state == State::kAtBlockBarrier) waiting = true;
    if (thread.state == State::kReady || thread.state == State::kAtCollective) return false;
  }
  if (!waiting) return false;
  for (Thread& thread : block.threads) {
    if (thread.state == State::kAtBlockBarrier) thread.state = State::kReady;
  }
  return true;
}

std::string describe_deadlock(const Block& block) {
  size_t at_barrier = 0;
  size_t at_collective = 0;
  size_t done = 0;
  for (const Thread& thread : block.threads) {
    at_barrier += thread.state == State::kAtBlockBarrier;
    at_collective += thread.state == State::kAtCollective;
    done += thread.state == State::kDone;
  }
  return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
         std::to_string(block.index.z) + ") can never go on: " + std::to_string(at_barrier) +
         " threads wait at __syncthreads, " + std::to_string(at_collective) +
         " at a warp collective whose other lanes do not come, " + std::to_string(done) +
         " have returned";
}

void run_block(Block& block, std::mt19937_64& random) {
  current = &block;
  const size_t count = block.threads.size();
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.number = static_cast<int>(i);
    thread.index = dim3(static_cast<unsigned>(i) % block.size.x,
                        static_cast<unsigned>(i) / block.size.x % block.size.y,
                        static_cast<unsigned>(i) / (block.size.x * block.size.y));
    prepare(thread);
  }
  std::vector<size_t> ready;
  while (true) {
    ready.clear();
    bool all_done = true;
    for (size_t i = 0; i < count; ++i) {
      if (block.threads[i].state == State::kReady) ready.push_back(i);
      all_done = all_done && block.threads[i].state == State::kDone;
    }
    if (all_done) break;
    if (ready.empty()) {
      if (release_collectives(block) || release_block_barrier(block)) continue;
      current = nullptr;
      throw std::runtime_error(describe_deadlock(block));
    }
    std::shuffle(ready.begin(), ready.end(), random);
    for (const size_t i : ready) {
      resume(block.threads[i]);
      if (block.failure) std::rethrow_exception(block.failure);
    }
  }
  current = nullptr;
}

}  // namespace

const dim3& thread_index() { return current->running->index; }
const dim3& block_index() { return current->index; }
const dim3& block_size() { return current->size; }
const dim3& grid_size() { return current->grid; }
int lane() { return current->running->number % 32; }

void block_barrier() {
  current->running->state = State::kAtBlockBarrier;
  yield_to_scheduler();
}

std::array<uint64_t, 32> exchange(uint32_t mask, uint64_t value, Collective kind) {
  Thread& thread = *current->running;
  if (((mask >> lane()) & 1u) == 0) {
    throw std::runtime_error("a warp collective was called by a lane outside its mask");
  }
  thread.mask = mask;
  thread.kind = kind;
  thread.value = value;
  thread.state = State::kAtCollective;
  yield_to_scheduler();
  return thread.gathered;
}

void* shared_bytes(const char* file, int line, size_t bytes, size_t) {
  auto& array = current->shared[{file, line}];
  if (array.bytes == nullptr) array = poisoned(bytes, current->poison);
  return array.bytes.get();
}

void* dynamic_shared_bytes() { return current->dynamic_shared.bytes.get(); }

void launch(dim3 grid, dim3 block, size_t dynamic_shared, const Options& options,
            const std::function<void()>& kernel) {
  std::mt19937_64 random(options.seed);
  std::vector<uint64_t> order(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const uint64_t number : order) {
    Block state;
    state.index = dim3(static_cast<unsigned>(number % grid.x),
                       static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / grid.x / grid.y));
    state.size = block;
    state.grid = grid;
    state.threads = std::vector<Thread>(static_cast<size_t>(block.x) * block.y * block.z);
    state.kernel = &kernel;
    state.poison = options.poison;
    state.dynamic_shared = poisoned(dynamic_shared, options.poison);
    run_block(state, random);
  }
}

}  // namespace simt
