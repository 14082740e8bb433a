// Where weights lie, how those that come next are fetched, and where their products are summed.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace octavo::ISA {
namespace {

constexpr int64_t kWide = 2 * kLanes;   // columns of a register tile
constexpr int64_t kPanel = 4 * kLanes;  // columns of a panel
constexpr int kTurns = 2;               // fetches a step of a tile

// Where column c of a row is: rows one behind the other, or in panels.
inline int64_t place(bool in_panels, int64_t rows, int64_t n, int64_t row, int64_t c) {
  return in_panels ? (c / kPanel * rows + row) * kPanel + c % kPanel : row * n + c;
}

// What is read next, fetched into L2 while something else is multiplied: `step` bytes a turn.
struct Ahead {
  const char* next;
  int64_t step;
  void turn() {
    __builtin_prefetch(next, 0, 2);
    next += step;
  }
};

// Of a panel's columns, for so many rows: zeros, until this thread's next call.
inline float* cleared_sums(int64_t rows) {
  static thread_local std::vector<float> sums;
  sums.assign(rows * kPanel, 0.0f);
  return sums.data();
}

// A vector of y from element `to` on, in y's type.
inline void write_y(const Matmul& m, int64_t to, Vec value) {
  if (m.narrow_y != nullptr) narrow(m.narrow_y + to, value);
  else write(m.y + to, value);
}

}  // namespace
}  // namespace octavo::ISA
