// Products of a few rows with a matrix of weights, tile by tile.
#include "kernels.h"
#include "vectors.h"

#include <algorithm>

namespace octavo::ISA {
namespace {

constexpr int64_t kWide = 2 * kLanes;                // columns of a register tile
constexpr int64_t kTileRows = LANES == 16 ? 12 : 6;  // its rows; tile, weights and one row's value fill the registers
constexpr int64_t kDeep = 8;                         // rows of w that are streamed at once
constexpr int64_t kPanel = 4 * kLanes;               // columns of a panel
constexpr int64_t kBlock = 256;                      // rows of w that are widened at once: 2 * kWide columns fit in L1

// y[kRows, kVecs vectors] += x[kRows, depth] @ w[depth, kVecs vectors]
template <int kRows, int kVecs, typename W>
inline void tile(const float* x, int64_t x_stride, const W* w, int64_t w_stride, float* y, int64_t y_stride,
                 int64_t depth) {
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = read<Vec>(y + r * y_stride + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Vec weights[kVecs];
    for (int v = 0; v < kVecs; ++v) weights[v] = widen(w + k * w_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float value = x[r * x_stride + k];
      for (int v = 0; v < kVecs; ++v) sum[r][v] += value * weights[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) write(y + r * y_stride + v * kLanes, sum[r][v]);
}

// The same for any number of rows and two vectors; at least eight sums at once, which hides a product's latency.
template <typename W>
inline void tiles(const float* x, int64_t x_stride, const W* w, int64_t w_stride, float* y, int64_t y_stride,
                  int64_t rows, int64_t depth) {
  int64_t r = 0;
  for (; rows - r >= kTileRows && rows - r != kTileRows + 2; r += kTileRows)
    tile<kTileRows, 2>(x + r * x_stride, x_stride, w, w_stride, y + r * y_stride, y_stride, depth);
  for (; rows - r >= 4; r += 4)
    tile<4, 2>(x + r * x_stride, x_stride, w, w_stride, y + r * y_stride, y_stride, depth);
  for (; rows - r >= 2; r += 2)
    tile<2, 2>(x + r * x_stride, x_stride, w, w_stride, y + r * y_stride, y_stride, depth);
  if (r < rows) tile<1, 2>(x + r * x_stride, x_stride, w, w_stride, y + r * y_stride, y_stride, depth);
}

// Row k of w from column c on, and the elements from one row to the next.
template <typename W>
inline const W* at(const Matmul& m, const W* w, int64_t k, int64_t c) {
  return m.in_panels ? w + (c / kPanel * m.k + k) * kPanel + c % kPanel : w + k * m.n + c;
}
inline int64_t stride_of(const Matmul& m) { return m.in_panels ? kPanel : m.n; }

// Few rows: limited by reading w. kDeep of its rows are read along their columns, the next ones on their way.
template <int kRows, typename W>
void stream(const Matmul& m, const W* w, int64_t begin, int64_t end) {
  constexpr int kVecs = kRows > 2 ? 2 : 4;
  constexpr int64_t kStride = kVecs * kLanes;
  const int64_t stride = stride_of(m);
  for (int64_t t = 0; t < kRows; ++t) std::fill(m.y + t * m.n + begin, m.y + t * m.n + end, 0.0f);
  for (int64_t k = 0; k < m.k; k += kDeep) {
    const int64_t depth = std::min(kDeep, m.k - k), next = std::min(kDeep, m.k - k - depth);
    int64_t c = begin;
    for (; c + kStride <= end; c += kStride) {
      const W* rows = at(m, w, k, c);
      for (int64_t d = 0; d < next; ++d) __builtin_prefetch(rows + (kDeep + d) * stride);
      tile<kRows, kVecs>(m.x + k, m.k, rows, stride, m.y + c, m.n, depth);
    }
    if (c < end) tile<kRows, 2>(m.x + k, m.k, at(m, w, k, c), stride, m.y + c, m.n, depth);
  }
}

// The same, one panel after the other: memory is read from one end to the other.
template <int kRows, typename W>
void streamed(const Matmul& m, const W* w, int64_t begin, int64_t end) {
  if (!m.in_panels) return stream<kRows>(m, w, begin, end);
  for (int64_t c = begin; c < end; c += kPanel) stream<kRows>(m, w, c, c + kPanel);
}

// Widens `depth` rows of kVecs vectors each, one behind the other.
template <int kVecs, typename W>
inline void fill(float* panel, const W* w, int64_t w_stride, int64_t depth) {
  for (int64_t d = 0; d < depth; ++d, panel += kVecs * kLanes, w += w_stride) {
    __builtin_prefetch(w + 8 * w_stride);
    for (int v = 0; v < kVecs; ++v) write(panel + v * kLanes, widen(w + v * kLanes));
  }
}

// More rows: limited by arithmetic. A block of w is widened once, a cache line's columns of it, for all rows.
template <typename W>
void block(const Matmul& m, const W* w, int64_t begin, int64_t end) {
  alignas(64) static thread_local float panel[kBlock * 2 * kWide];
  for (int64_t t = 0; t < m.tokens; ++t) std::fill(m.y + t * m.n + begin, m.y + t * m.n + end, 0.0f);
  for (int64_t k = 0; k < m.k; k += kBlock) {
    const int64_t depth = std::min(kBlock, m.k - k);
    const int64_t stride = stride_of(m);
    const float* x = m.x + k;
    int64_t c = begin;
    for (; c + 2 * kWide <= end; c += 2 * kWide) {
      fill<4>(panel, at(m, w, k, c), stride, depth);
      tiles(x, m.k, panel, 2 * kWide, m.y + c, m.n, m.tokens, depth);
      tiles(x, m.k, panel + kWide, 2 * kWide, m.y + c + kWide, m.n, m.tokens, depth);
    }
    if (c < end) {
      fill<2>(panel, at(m, w, k, c), stride, depth);
      tiles(x, m.k, panel, kWide, m.y + c, m.n, m.tokens, depth);
    }
  }
}

// y[t, n] of kRows rows and one row of a transposed w.
template <int kRows, typename W>
inline void dots(const Matmul& m, const W* w, int64_t t, int64_t n) {
  Vec even[kRows] = {}, odd[kRows] = {};
  for (int64_t k = 0; k < m.k; k += kWide) {
    const Vec a = widen(w + k), b = widen(w + k + kLanes);
    for (int r = 0; r < kRows; ++r) {
      even[r] += read<Vec>(m.x + (t + r) * m.k + k) * a;
      odd[r] += read<Vec>(m.x + (t + r) * m.k + k + kLanes) * b;
    }
  }
  for (int r = 0; r < kRows; ++r) m.y[(t + r) * m.n + n] = total(even[r] + odd[r]);
}

template <typename W>
void transposed(const Matmul& m, const W* w, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const W* row = w + n * m.k;
    int64_t t = 0;
    for (; t + 4 <= m.tokens; t += 4) dots<4>(m, row, t, n);
    for (; t < m.tokens; ++t) dots<1>(m, row, t, n);
  }
}

template <typename W>
void columns_of(const Matmul& m, int64_t begin, int64_t end) {
  const W* w = static_cast<const W*>(m.w);
  if (m.transposed) return transposed(m, w, begin, end);
  switch (m.tokens) {
    case 1: return streamed<1>(m, w, begin, end);
    case 2: return streamed<2>(m, w, begin, end);
    case 3: return streamed<3>(m, w, begin, end);
    case 4: return streamed<4>(m, w, begin, end);
    default: return block(m, w, begin, end);
  }
}

}  // namespace

void columns(const Matmul& m, int64_t begin, int64_t end) {
  switch (m.type) {
    case Type::kFloat32: return columns_of<float>(m, begin, end);
    case Type::kBFloat16: return columns_of<uint16_t>(m, begin, end);
    case Type::kInt8: return columns_of<int8_t>(m, begin, end);
  }
}

}  // namespace octavo::ISA
