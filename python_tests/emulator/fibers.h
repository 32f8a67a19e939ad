// Threads of blocks that run at the same time, as fibers of one thread of the host. Fibers switch
// where they wait and nowhere else, and where none can go on, as on a GPU that hangs, there is an
// error that says who waits for what.
//
// They run in turn, or, with a seed, in an order drawn from it: some warps far ahead of others, and
// what is under way happening early or late.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

struct Fiber {
  ucontext_t start;  // entered once; the switches after it are jumps, which cost no system call
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  int64_t thread, block;  // in its block, and the block among those that run
  size_t warp;            // among those of all blocks
  bool entered = false, done = false;
  std::string waits_for;
};

// Fibers wait for it until another one, or something under way, wakes them.
struct Event {
  std::vector<Fiber*> waiting{};
};

// All members meet, again and again.
struct Meeting {
  size_t members = 0, arrived = 0;
  int64_t held = 0;
  const char* what = nullptr;
  Event next{};
};

struct Warp {
  size_t first;           // its first fiber
  uint32_t ready = 0;     // a bit for each lane that can go on
  bool late = false;      // goes on when no other warp can
  uint64_t offers[64]{};  // of lanes to each other, in two places in turn
  Meeting meeting{};
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<Meeting> block_meetings;
inline Fiber* current;                                // null: what was under way happens
inline std::vector<std::function<void()>> under_way;  // each happens once, at some time
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::exception_ptr failure;  // exceptions do not cross fibers by themselves
inline uint64_t seed = 0, draws = 0;

inline uint64_t draw(uint64_t below) {  // splitmix64
  uint64_t x = seed + ++draws * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return (x ^ (x >> 31)) % below;
}

inline uint32_t bit_of(const Fiber& fiber) { return 1u << fiber.thread % 32; }

inline void wait_for(Event& event, const char* what, const std::string& which = {}) {
  Fiber* self = current;
  event.waiting.push_back(self);
  self->waits_for = what;
  self->waits_for += which;
  warps[self->warp].ready &= ~bit_of(*self);
  if (_setjmp(self->place) == 0) _longjmp(scheduler, 1);
}

inline void wake(Event& event) {
  for (const Fiber* fiber : event.waiting) warps[fiber->warp].ready |= bit_of(*fiber);
  event.waiting.clear();
}

inline void meet(Meeting& meeting, const char* what) {
  if (meeting.arrived == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what) != 0)
    throw std::logic_error(std::string("threads that should meet are at ") + meeting.what +
                           " and at " + what);
  const int64_t held = meeting.held;
  if (++meeting.arrived < meeting.members) {
    while (meeting.held == held) wait_for(meeting.next, what);
    return;
  }
  meeting.arrived = 0;
  ++meeting.held;
  wake(meeting.next);
}

// A fiber runs one body after another.
inline void enter() {
  for (;;) {
    try {
      body();
    } catch (...) {
      failure = std::current_exception();
    }
    current->done = true;
    warps[current->warp].ready &= ~bit_of(*current);
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
  }
}

inline void go_on(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (std::exchange(fiber.entered, true)) _longjmp(fiber.place, 1);
  setcontext(&fiber.start);
}

inline void let_one_happen() {
  const size_t which = seed ? draw(under_way.size()) : 0;
  const std::function<void()> happens = std::move(under_way[which]);
  under_way.erase(under_way.begin() + static_cast<int64_t>(which));
  current = nullptr;
  happens();
}

[[noreturn]] inline void report_that_none_can_go_on() {
  std::map<std::string, int> waiting;
  for (const Fiber& fiber : fibers)
    if (!fiber.done)
      ++waiting["block " + std::to_string(fiber.block) + ", warp " +
                std::to_string(fiber.thread / 32) + " for " + fiber.waits_for];
  std::string text = "no thread can go on; there wait";
  for (const auto& [who, count] : waiting) text += "\n  " + std::to_string(count) + " of " + who;
  throw std::logic_error(text);
}

// Mostly the warp that went on before, else any, but a late one only if it must.
inline size_t choose_warp(size_t before, uint64_t patience) {
  if (warps[before].ready && !warps[before].late && (!seed || draw(patience))) return before;
  const size_t start = seed ? draw(warps.size()) : before;
  for (const bool late : {false, true})
    for (size_t i = 0; i < warps.size(); ++i) {
      const size_t warp = (start + i) % warps.size();
      if (warps[warp].ready && warps[warp].late == late) return warp;
    }
  return warps.size();
}

inline Fiber& choose_lane(const Warp& warp) {
  const auto turn = seed ? static_cast<int>(draw(32)) : 0;
  const uint32_t turned = warp.ready >> turn | warp.ready << (32 - turn) % 32;
  return fibers[warp.first + static_cast<size_t>(__builtin_ctz(turned) + turn) % 32];
}

inline void make_fibers(int64_t blocks, int64_t threads) {
  if (blocks * threads > 2048) throw std::logic_error("more threads than there are fibers for");
  fibers.reserve(2048);  // a context must not move
  fibers.resize(static_cast<size_t>(blocks * threads));
  block_meetings.assign(static_cast<size_t>(blocks), {});
  warps.clear();
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    constexpr size_t kStack = 64 << 10;
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    if (!fiber.done) fiber.entered = false;  // new, or it stopped on the way, where another failed
    fiber.thread = static_cast<int64_t>(i) % threads;
    fiber.block = static_cast<int64_t>(i) / threads;
    if (fiber.thread % 32 == 0) warps.push_back({.first = i});
    fiber.warp = warps.size() - 1;
    fiber.done = false;
    warps.back().ready |= bit_of(fiber);
    ++warps.back().meeting.members;
    ++block_meetings[static_cast<size_t>(fiber.block)].members;
    if (fiber.entered) continue;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
}

// Runs all threads of some blocks; `switched` is called before each stretch of one of them.
inline void run_fibers(int64_t blocks, int64_t threads, std::function<void()> kernel,
                       const std::function<void()>& switched) {
  make_fibers(blocks, threads);
  body = std::move(kernel);
  under_way.clear();
  // How often warps change, and what is under way happens, in the mean over scheduling steps.
  constexpr uint64_t kPatience[] = {1, 4, 30, 300}, kDelay[] = {1, 20, 400, 1 << 30};
  const uint64_t patience = seed ? kPatience[draw(4)] : 1, delay = seed ? kDelay[draw(4)] : 0;
  size_t warp = 0;
  for (;;) {
    if (seed && draw(500) == 0)
      for (Warp& other : warps) other.late = draw(2);
    if (seed && !under_way.empty() && draw(delay) == 0) let_one_happen();
    const size_t next = choose_warp(warp, patience);
    if (next < warps.size()) {
      warp = next;
      current = &choose_lane(warps[warp]);
      switched();
      go_on(*current);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    } else if (!under_way.empty()) {
      let_one_happen();
    } else if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; })) {
      return;
    } else {
      report_that_none_can_go_on();
    }
  }
}

}  // namespace emulator
