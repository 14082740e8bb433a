// The highest number of a row of logits, and whether all are finite.
#include "kernels.h"
#include "vectors.h"

namespace octavo::ISA {
namespace {

// What a lane has seen: the highest number, where it was first, and all bits set where one was not finite.
struct Seen {
  Vec highest;
  Ints where, faulty;
  void add(Vec number, Ints here) {
    const Ints higher = number > highest;
    highest = higher ? number : highest;
    where = higher ? here : where;
    faulty |= (number - number) != Vec{};
  }
};

}  // namespace

void greedy(const Greedy& g, int64_t begin, int64_t end) {
  constexpr int kAtOnce = 4;  // hide a comparison's latency
  Ints first{};
  for (int i = 0; i < kLanes; ++i) first[i] = i;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = g.logits + row * g.vocab;
    Seen seen[kAtOnce];
    for (Seen& one : seen) one = {splat(-__builtin_inff()), Ints{}, Ints{}};
    int64_t j = 0;
    for (; j + kAtOnce * kLanes <= g.vocab; j += kAtOnce * kLanes)
      for (int c = 0; c < kAtOnce; ++c) {
        const int64_t at = j + c * kLanes;
        seen[c].add(widen(x + at), first + static_cast<int32_t>(at));
      }
    float highest = -__builtin_inff();
    int32_t where = 0;
    bool faulty = false;
    const auto add = [&](float number, int32_t here) {
      if (number > highest || (number == highest && here < where)) highest = number, where = here;
    };
    for (const Seen& one : seen)
      for (int i = 0; i < kLanes; ++i) {
        add(one.highest[i], one.where[i]);
        faulty |= one.faulty[i] != 0;
      }
    for (; j < g.vocab; ++j) {
      add(x[j], static_cast<int32_t>(j));
      faulty |= x[j] - x[j] != 0;
    }
    g.token[row] = where;
    g.faulty[row] = faulty;
  }
}

}  // namespace octavo::ISA
