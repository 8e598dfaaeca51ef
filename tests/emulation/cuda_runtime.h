// A GPU on the host, as far as the kernels of rank-1 experts need one: found in place of CUDA's header of this name, it
// lets a C++ compiler and its sanitizers have the kernels as they are.
//
// Blocks run one after the other, each thread of a block as a fiber that goes on until it waits: for the other lanes of
// its warp in an exchange, or for the whole block. Which warp goes on, and how far before another one does, is drawn
// anew each time, so that a barrier that is missing shows in the numbers; one that some threads never come to is an
// error. Unlike on a GPU, every access is seen by all at once and at the same address, and threads that have ended are
// still waited for.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Of a block that runs alone: static within a kernel, and `extern` where a launch tells its size.
#define __shared__ thread_local

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using std::max;
using std::min;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

namespace gpu {

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps;
constexpr size_t kStack = 64 * 1024;

inline std::mt19937 random;

inline int draw(int below) { return static_cast<int>(random() % static_cast<unsigned>(below)); }

// A number of threads that wait for each other; `rounds` counts how often all have come.
struct Barrier {
  int size, arrived;
  int64_t rounds;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  void* fake_stack;
  const Barrier* barrier;
  int64_t round;
  int exchanges;
  bool ended;

  bool waits() const { return barrier != nullptr && barrier->rounds == round; }
};

struct Index {
  unsigned x;
};

inline Index thread, block, grid;
inline Thread threads[kThreads];
inline Barrier of_block, of_warp[kWarps];
inline uint64_t exchanged[2][kThreads];  // what a warp exchanges is read while the next exchange is under way
inline std::function<void()> kernel;
inline ucontext_t scheduler;
inline void* fake_stack_of_scheduler;
inline const void* stack_of_scheduler;
inline size_t size_of_scheduler;

// Gives the processor back to the scheduler, for good or until it lets the thread go on.
inline void leave(bool for_good) {
  Thread& t = threads[thread.x];
  __sanitizer_start_switch_fiber(for_good ? nullptr : &t.fake_stack, stack_of_scheduler, size_of_scheduler);
  swapcontext(&t.context, &scheduler);
  __sanitizer_finish_switch_fiber(t.fake_stack, nullptr, nullptr);
}

inline void enter(unsigned number) {
  Thread& t = threads[number];
  thread.x = number;
  __sanitizer_start_switch_fiber(&fake_stack_of_scheduler, t.stack.data(), kStack);
  swapcontext(&scheduler, &t.context);
  __sanitizer_finish_switch_fiber(fake_stack_of_scheduler, nullptr, nullptr);
}

inline void run_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &stack_of_scheduler, &size_of_scheduler);
  kernel();
  threads[thread.x].ended = true;
  leave(true);
}

inline void wait_at(Barrier& barrier) {
  Thread& t = threads[thread.x];
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.rounds;
    return;
  }
  t.barrier = &barrier;
  t.round = barrier.rounds;
  leave(false);
  t.barrier = nullptr;
}

template <typename T>
T exchange(T value, int from_lane) {
  const unsigned warp = thread.x / kLanes;
  uint64_t(&slots)[kThreads] = exchanged[threads[thread.x].exchanges++ % 2];
  std::memcpy(&slots[thread.x], &value, sizeof(value));
  wait_at(of_warp[warp]);
  std::memcpy(&value, &slots[warp * kLanes + static_cast<unsigned>(from_lane) % kLanes], sizeof(value));
  return value;
}

inline void start_threads() {
  of_block = {kThreads, 0, 0};
  for (Barrier& barrier : of_warp) barrier = {kLanes, 0, 0};
  for (Thread& t : threads) {
    t.stack.resize(kStack);
    ASAN_UNPOISON_MEMORY_REGION(t.stack.data(), kStack);  // of what a thread left there that did not return
    t.fake_stack = nullptr;
    t.barrier = nullptr;
    t.exchanges = 0;
    t.ended = false;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, run_thread, 0);
  }
}

// Lets each lane of a warp that can go on do so once, from a lane that is drawn; how many did.
inline int run_warp(int warp) {
  int ran = 0;
  for (int i = 0, first = draw(kLanes); i < kLanes; ++i) {
    const int number = warp * kLanes + (first + i) % kLanes;
    if (threads[number].ended || threads[number].waits()) continue;
    enter(static_cast<unsigned>(number));
    ++ran;
  }
  return ran;
}

inline void run_block() {
  start_threads();
  for (int ran = 1; ran > 0;) {
    int warps[kWarps] = {0, 1, 2, 3, 4, 5, 6, 7};
    std::shuffle(warps, warps + kWarps, random);
    ran = 0;
    for (int warp : warps) {
      for (int rounds = 1 + draw(40), now = 1; rounds > 0 && now > 0; --rounds) ran += now = run_warp(warp);
    }
  }
  const auto waiting = std::count_if(threads, threads + kThreads, [](const Thread& t) { return !t.ended; });
  if (waiting == 0) return;
  std::fprintf(stderr, "deadlock: %ld threads wait for others that do not come\n", static_cast<long>(waiting));
  std::abort();
}

// Memory whose size is told at a launch: what is beyond `used` must not be touched.
struct Shared {
  float* data;
  size_t capacity, used;
};

// Runs a kernel with no more than `blocks` blocks: each must do with any number of them.
template <typename Body>
void launch(unsigned blocks, Body body, Shared shared = {nullptr, 0, 0}) {
  grid.x = draw(2) ? blocks : std::min(blocks, 1 + static_cast<unsigned>(draw(3)));
  kernel = body;
  for (block.x = 0; block.x < grid.x; ++block.x) {
    std::fill_n(shared.data, shared.capacity, __uint_as_float(0x7fc00000u));
    ASAN_POISON_MEMORY_REGION(shared.data + shared.used, (shared.capacity - shared.used) * sizeof(float));
    run_block();
    ASAN_UNPOISON_MEMORY_REGION(shared.data, shared.capacity * sizeof(float));
  }
}

}  // namespace gpu

#define threadIdx gpu::thread
#define blockIdx gpu::block
#define gridDim gpu::grid

inline void __syncthreads() { gpu::wait_at(gpu::of_block); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return gpu::exchange(value, lane);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return gpu::exchange(value, static_cast<int>(threadIdx.x % gpu::kLanes) ^ mask);
}
