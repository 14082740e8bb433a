// Products of a few rows with a matrix of weights, tile by tile.
#include "kernels.h"
#include "vectors.h"

#include <algorithm>
#include <type_traits>

namespace octavo::ISA {
namespace {

constexpr int64_t kWide = 2 * kLanes;                // columns of a register tile
constexpr int64_t kTileRows = LANES == 16 ? 12 : 6;  // its rows; tile, weights and one row's value fill the registers
constexpr int64_t kDeep = 8;                         // stored rows of w that are streamed at once: few, since each
                                                     // may fall into the same set of the cache
constexpr int64_t kPanelDeep = 32;                   // rows of w of a panel, where they are one behind the other
constexpr int64_t kPanel = 4 * kLanes;               // columns of a panel
constexpr int64_t kBlock = 256;                      // rows of w that are widened at once: 2 * kWide columns fit in L1

// Where column c of a row is: rows one behind the other, or in panels.
inline int64_t place(bool in_panels, int64_t rows, int64_t n, int64_t row, int64_t c) {
  return in_panels ? (c / kPanel * rows + row) * kPanel + c % kPanel : row * n + c;
}

// How w is stored. A stored row holds kRows rows of w, and `group` stored rows are alike: `at` gives a reader of kVecs
// vectors from column c on of those that begin with `row` and are of group `g`; its `read` widens the d-th of them.

template <typename W>
struct Plain {
  static constexpr int kRows = 1, kStreamed = 8;  // rows of x up to which widening w again and again is cheaper
  const W* w;
  int64_t rows, n, stride, group;
  bool in_panels;

  explicit Plain(const Matmul& m)
      : w(static_cast<const W*>(m.w)),
        rows(m.k),
        n(m.n),
        stride(m.in_panels ? kPanel : m.n),
        group(m.k),
        in_panels(m.in_panels) {}

  template <int kVecs>
  struct Reader {
    const W* w;
    int64_t stride;
    void read(int64_t d, Vec (&out)[kRows][kVecs]) const {
      for (int v = 0; v < kVecs; ++v) out[0][v] = widen(w + d * stride + v * kLanes);
    }
  };

  template <int kVecs>
  Reader<kVecs> at(int64_t, int64_t row, int64_t c) const {
    return {w + place(in_panels, rows, n, row, c), stride};
  }
};

inline void numbers(const int8_t* w, Vec (&out)[1]) { out[0] = widen(w); }
inline void numbers(const uint8_t* w, Vec (&out)[2]) {
  const Ints pair = bytes(w);
  out[0] = floats(pair & 15);
  out[1] = floats(pair >> 4);
}

// int8_t: a row each; uint8_t: two nibbles.
template <typename W>
struct Packed {
  static constexpr int kRows = std::is_same_v<W, uint8_t> ? 2 : 1, kStreamed = 4;
  const W* w;
  const void *scales, *offsets;
  int64_t rows, groups, n, stride, group;
  bool in_panels, bfloat16_scales;

  explicit Packed(const Matmul& m)
      : w(static_cast<const W*>(m.w)),
        scales(m.scales),
        offsets(m.offsets),
        rows(m.k / kRows),
        groups(m.k / m.group),
        n(m.n),
        stride(m.in_panels ? kPanel : m.n),
        group(m.group / kRows),
        in_panels(m.in_panels),
        bfloat16_scales(m.scales_type == Type::kBFloat16) {}

  template <int kVecs>
  struct Reader {
    const W* w;
    int64_t stride;
    Vec scale[kVecs], offset[kVecs];
    void read(int64_t d, Vec (&out)[kRows][kVecs]) const {
      for (int v = 0; v < kVecs; ++v) {
        Vec number[kRows];
        numbers(w + d * stride + v * kLanes, number);
        for (int s = 0; s < kRows; ++s) out[s][v] = number[s] * scale[v] + offset[v];
      }
    }
  };

  template <int kVecs>
  Reader<kVecs> at(int64_t g, int64_t row, int64_t c) const {
    Reader<kVecs> reader{w + place(in_panels, rows, n, row, c), stride, {}, {}};
    const int64_t first = place(in_panels, groups, n, g, c);
    for (int v = 0; v < kVecs; ++v) {
      reader.scale[v] = factor(scales, first + v * kLanes);
      if (offsets != nullptr) reader.offset[v] = factor(offsets, first + v * kLanes);
      else reader.offset[v] = kRows == 2 ? reader.scale[v] * -8.0f : Vec{};
    }
    return reader;
  }
  Vec factor(const void* from, int64_t i) const {
    if (bfloat16_scales) return widen(static_cast<const uint16_t*>(from) + i);
    return widen(static_cast<const float*>(from) + i);
  }
};

// y[kRows, kVecs vectors] += x[kRows, kStored * depth] @ the reader's next `depth` stored rows
template <int kRows, int kVecs, int kStored, typename Reader>
inline void tile(const float* x, int64_t x_stride, const Reader& w, float* y, int64_t y_stride, int64_t depth) {
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = read<Vec>(y + r * y_stride + v * kLanes);
  for (int64_t d = 0; d < depth; ++d) {
    Vec weights[kStored][kVecs];
    w.read(d, weights);
    for (int s = 0; s < kStored; ++s)
      for (int r = 0; r < kRows; ++r) {
        const float value = x[r * x_stride + d * kStored + s];
        for (int v = 0; v < kVecs; ++v) sum[r][v] += value * weights[s][v];
      }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) write(y + r * y_stride + v * kLanes, sum[r][v]);
}

// The same for any number of rows and two vectors that are float32; at least eight sums at once, which hides a
// product's latency.
inline void tiles(const float* x, int64_t x_stride, const float* w, int64_t w_stride, float* y, int64_t y_stride,
                  int64_t rows, int64_t depth) {
  const Plain<float>::Reader<2> reader{w, w_stride};
  int64_t r = 0;
  for (; rows - r >= kTileRows && rows - r != kTileRows + 2; r += kTileRows)
    tile<kTileRows, 2, 1>(x + r * x_stride, x_stride, reader, y + r * y_stride, y_stride, depth);
  for (; rows - r >= 4; r += 4) tile<4, 2, 1>(x + r * x_stride, x_stride, reader, y + r * y_stride, y_stride, depth);
  for (; rows - r >= 2; r += 2) tile<2, 2, 1>(x + r * x_stride, x_stride, reader, y + r * y_stride, y_stride, depth);
  if (r < rows) tile<1, 2, 1>(x + r * x_stride, x_stride, reader, y + r * y_stride, y_stride, depth);
}

// A tile of up to 8 rows, 4 at a time: more would leave no registers for what is widened.
template <int kRows, int kVecs, int kStored, typename Reader>
inline void few(const float* x, int64_t x_stride, const Reader& w, float* y, int64_t y_stride, int64_t depth) {
  tile<std::min(kRows, 4), kVecs, kStored>(x, x_stride, w, y, y_stride, depth);
  if constexpr (kRows > 4)
    tile<kRows - 4, kVecs, kStored>(x + 4 * x_stride, x_stride, w, y + 4 * y_stride, y_stride, depth);
}

// Few rows: limited by reading w. Some of its stored rows are read along their columns, the next ones on their way.
template <int kRows, typename Weights>
void stream(const Matmul& m, const Weights& w, int64_t begin, int64_t end) {
  constexpr int kVecs = kRows > 2 ? 2 : 4, kStored = Weights::kRows;
  constexpr int64_t kStride = kVecs * kLanes;
  const int64_t deep = m.in_panels ? kPanelDeep / kStored : kDeep;
  for (int64_t t = 0; t < kRows; ++t) std::fill(m.y + t * m.n + begin, m.y + t * m.n + end, 0.0f);
  for (int64_t k = 0, g = 0, depth = 0; k < w.rows; k += depth) {
    if (k == (g + 1) * w.group) ++g;
    depth = std::min(deep, (g + 1) * w.group - k);
    const int64_t next = std::min(deep, w.rows - k - depth);
    const float* x = m.x + k * kStored;
    int64_t c = begin;
    for (; c + kStride <= end; c += kStride) {
      const auto reader = w.template at<kVecs>(g, k, c);
      for (int64_t d = 0; d < next; ++d) __builtin_prefetch(reader.w + (depth + d) * w.stride);
      few<kRows, kVecs, kStored>(x, m.k, reader, m.y + c, m.n, depth);
    }
    if (c < end) few<kRows, 2, kStored>(x, m.k, w.template at<2>(g, k, c), m.y + c, m.n, depth);
  }
}

// The same, one panel after the other: memory is read from one end to the other.
template <int kRows, typename Weights>
void streamed(const Matmul& m, const Weights& w, int64_t begin, int64_t end) {
  if (!m.in_panels) return stream<kRows>(m, w, begin, end);
  for (int64_t c = begin; c < end; c += kPanel) stream<kRows>(m, w, c, c + kPanel);
}

// Widens stored rows [row, end) of kVecs vectors each, one behind the other.
template <int kVecs, typename Weights>
inline void fill(float* panel, const Weights& w, int64_t row, int64_t end, int64_t c) {
  constexpr int kStored = Weights::kRows;
  for (int64_t g = row / w.group, stop; row < end; row = stop, ++g) {
    stop = std::min(end, (g + 1) * w.group);
    const auto reader = w.template at<kVecs>(g, row, c);
    for (int64_t d = 0; d < stop - row; ++d, panel += kStored * kVecs * kLanes) {
      __builtin_prefetch(reader.w + (d + 8) * w.stride);
      Vec weights[kStored][kVecs];
      reader.read(d, weights);
      for (int s = 0; s < kStored; ++s)
        for (int v = 0; v < kVecs; ++v) write(panel + (s * kVecs + v) * kLanes, weights[s][v]);
    }
  }
}

// More rows: limited by arithmetic. A block of w is widened once, a cache line's columns of it, for all rows.
template <typename Weights>
void block(const Matmul& m, const Weights& w, int64_t begin, int64_t end) {
  alignas(64) static thread_local float panel[kBlock * 2 * kWide];
  for (int64_t t = 0; t < m.tokens; ++t) std::fill(m.y + t * m.n + begin, m.y + t * m.n + end, 0.0f);
  for (int64_t k = 0; k < m.k; k += kBlock) {
    const int64_t depth = std::min(kBlock, m.k - k), row = k / Weights::kRows, stop = (k + depth) / Weights::kRows;
    const float* x = m.x + k;
    int64_t c = begin;
    for (; c + 2 * kWide <= end; c += 2 * kWide) {
      fill<4>(panel, w, row, stop, c);
      tiles(x, m.k, panel, 2 * kWide, m.y + c, m.n, m.tokens, depth);
      tiles(x, m.k, panel + kWide, 2 * kWide, m.y + c + kWide, m.n, m.tokens, depth);
    }
    if (c < end) {
      fill<2>(panel, w, row, stop, c);
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
void transposed(const Matmul& m, int64_t begin, int64_t end) {
  const W* w = static_cast<const W*>(m.w);
  for (int64_t n = begin; n < end; ++n) {
    const W* row = w + n * m.k;
    int64_t t = 0;
    for (; t + 4 <= m.tokens; t += 4) dots<4>(m, row, t, n);
    for (; t + 2 <= m.tokens; t += 2) dots<2>(m, row, t, n);
    for (; t < m.tokens; ++t) dots<1>(m, row, t, n);
  }
}

template <typename Weights>
void columns_of(const Matmul& m, int64_t begin, int64_t end) {
  const Weights w(m);
  switch (m.tokens) {
    case 1: return streamed<1>(m, w, begin, end);
    case 2: return streamed<2>(m, w, begin, end);
    case 3: return streamed<3>(m, w, begin, end);
    case 4: return streamed<4>(m, w, begin, end);
  }
  if constexpr (Weights::kStreamed == 8) switch (m.tokens) {
      case 5: return streamed<5>(m, w, begin, end);
      case 6: return streamed<6>(m, w, begin, end);
      case 7: return streamed<7>(m, w, begin, end);
      case 8: return streamed<8>(m, w, begin, end);
    }
  block(m, w, begin, end);
}

template <typename W>
void plain(const Matmul& m, int64_t begin, int64_t end) {
  return m.transposed ? transposed<W>(m, begin, end) : columns_of<Plain<W>>(m, begin, end);
}

}  // namespace

void columns(const Matmul& m, int64_t begin, int64_t end) {
  switch (m.type) {
    case Type::kFloat32: return plain<float>(m, begin, end);
    case Type::kBFloat16: return plain<uint16_t>(m, begin, end);
    case Type::kInt8:
      return m.scales == nullptr ? plain<int8_t>(m, begin, end) : columns_of<Packed<int8_t>>(m, begin, end);
    case Type::kInt4: return columns_of<Packed<uint8_t>>(m, begin, end);
  }
}

}  // namespace octavo::ISA
