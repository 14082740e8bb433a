// Products of a few rows with a matrix of weights, tile by tile.
#include "kernels.h"
#include "panels.h"
#include "vectors.h"

#include <algorithm>
#include <type_traits>

namespace octavo::ISA {
namespace {

constexpr int64_t kTileRows = LANES == 16 ? 12 : 6;  // its rows; tile, weights and one row's value fill the registers
constexpr int64_t kDeep = 8;                         // stored rows of w that are streamed at once: few, since each
                                                     // may fall into the same set of the cache
constexpr int64_t kPanelDeep = 32;                   // rows of w of a panel, where they are one behind the other
constexpr int64_t kBlock = 2560 / kLanes;            // most rows of w that are widened at once: kWide columns of them
                                                     // stay in L1 beside a tile's rows of x

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

// Scales and offsets of one group, where there are any, of kVecs vectors of columns.
template <int kVecs>
struct Factors {
  bool scaled, offset;
  Vec scale[kVecs], shift[kVecs];
};

// int8_t: a row each; uint8_t: two nibbles.
template <typename W>
struct Packed {
  static constexpr int kRows = std::is_same_v<W, uint8_t> ? 2 : 1, kStreamed = 4;
  static constexpr int kPairRows = 2 / kRows;  // stored rows of a pair
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
    const Factors<kVecs> found = factors<kVecs>(g, c, true);
    for (int v = 0; v < kVecs; ++v) {
      reader.scale[v] = found.scale[v];
      reader.offset[v] = found.offset || kRows == 1 ? found.shift[v] : found.scale[v] * -8.0f;
    }
    return reader;
  }
  // with_offsets: or without
  template <int kVecs>
  Factors<kVecs> factors(int64_t g, int64_t c, bool with_offsets) const {
    Factors<kVecs> found{scales != nullptr, with_offsets && offsets != nullptr, {}, {}};
    const int64_t first = place(in_panels, groups, n, g, c);
    for (int v = 0; v < kVecs; ++v) {
      if (found.scaled) found.scale[v] = factor(scales, first + v * kLanes);
      if (found.offset) found.shift[v] = factor(offsets, first + v * kLanes);
    }
    return found;
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

// Widened rows of kWide columns; while they are read, `step` bytes a row of what is widened next are fetched.
struct Widened {
  const float* w;
  const char* next;
  int64_t step;
  void read(int64_t d, Vec (&out)[1][2]) const {
    __builtin_prefetch(next + d * step);
    for (int v = 0; v < 2; ++v) out[0][v] = widen(w + d * kWide + v * kLanes);
  }
};

// The same for any number of rows.
inline void tiles(const float* x, int64_t x_stride, Widened& w, float* y, int64_t y_stride, int64_t rows,
                  int64_t depth) {
  in_heights<kTileRows>(rows, [&](auto height, int64_t r) {
    tile<height, 2, 1>(x + r * x_stride, x_stride, w, y + r * y_stride, y_stride, depth);
    w.next += depth * w.step;
  });
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

// Widens stored rows [row, end) of kWide columns each, one behind the other.
template <typename Weights>
inline void fill(float* panel, const Weights& w, int64_t row, int64_t end, int64_t c) {
  constexpr int kStored = Weights::kRows;
  for (int64_t g = row / w.group, stop; row < end; row = stop, ++g) {
    stop = std::min(end, (g + 1) * w.group);
    const auto reader = w.template at<2>(g, row, c);
    for (int64_t d = 0; d < stop - row; ++d, panel += kStored * kWide) {
      __builtin_prefetch(reader.w + (d + 8) * w.stride);
      Vec weights[kStored][2];
      reader.read(d, weights);
      for (int s = 0; s < kStored; ++s)
        for (int v = 0; v < 2; ++v) write(panel + s * kWide + v * kLanes, weights[s][v]);
    }
  }
}

// More rows: limited by arithmetic. Up to kBlock rows of w are widened once, a panel's columns of them, for all rows of
// x; the columns that follow are on their way from memory meanwhile.
template <typename Weights>
void block(const Matmul& m, const Weights& w, int64_t begin, int64_t end) {
  alignas(64) static thread_local float wide[kPanel / kWide][kBlock * kWide];
  constexpr int64_t kStored = Weights::kRows;
  const int64_t blocks = (w.rows * kStored + kBlock - 1) / kBlock, deep = (w.rows + blocks - 1) / blocks;
  const int64_t calls = kPanel / kWide * ((m.tokens + kTileRows - 1) / kTileRows);
  const int64_t step = m.in_panels ? (sizeof(*w.w) * kPanel / kStored + calls - 1) / calls : 0;
  for (int64_t r = 0; r < m.tokens; ++r) std::fill(m.y + r * m.n + begin, m.y + r * m.n + end, 0.0f);
  for (int64_t row = 0, stop; row < w.rows; row = stop) {
    stop = std::min(w.rows, row + deep);
    for (int64_t c = begin; c < end; c += kPanel) {
      const int64_t parts = std::min<int64_t>(kPanel, end - c) / kWide;
      for (int64_t part = 0; part < parts; ++part) fill(wide[part], w, row, stop, c + part * kWide);
      const int64_t after = c + kPanel < end ? place(m.in_panels, w.rows, m.n, row, c + kPanel)
                                             : place(m.in_panels, w.rows, m.n, stop % w.rows, begin);
      const char* next = reinterpret_cast<const char*>(w.w + after);
      for (int64_t part = 0; part < parts; ++part) {
        Widened widened{wide[part], next, step};
        tiles(m.x + row * kStored, m.k, widened, m.y + c + part * kWide, m.n, m.tokens, (stop - row) * kStored);
        next = widened.next;
      }
    }
  }
}

// A step along k of products with a transposed w: so many numbers of x and of w, and what they add to a sum.
template <typename X, typename W>
struct Terms {
  static constexpr int64_t kStep = kLanes;
  static Vec of_x(const X* x) { return read<Vec>(x); }
  static Vec of_w(const W* w) { return widen(w); }
  static Vec add(Vec sum, Vec x, Vec w) { return sum + x * w; }
};

#ifdef __AVX512BF16__
template <>
struct Terms<uint16_t, uint16_t> {
  static constexpr int64_t kStep = 2 * kLanes;
  static __m512i of_x(const uint16_t* x) { return _mm512_loadu_si512(x); }
  static __m512i of_w(const uint16_t* w) { return _mm512_loadu_si512(w); }
  static Vec add(Vec sum, __m512i x, __m512i w) { return add_pairs(sum, x, w); }
};

// kRows rows of y, kUnits * kWide columns from c on; w is where these begin. A register holds two rows of w beside each other,
// a unit's columns in the order of pairs.
template <int kRows, int kUnits, bool kFetch>
inline void pair_tile(const Matmul& m, int64_t row, const uint16_t* w, int64_t w_stride, int64_t c, Ahead& ahead) {
  const uint16_t* x = m.halves + row * m.k;
  const int64_t k = m.k;
  Vec sum[kRows][kUnits][2];
  clear(sum);
  for (int64_t d = 0; d < k; d += 2) {
    __m512i pairs[kUnits][2];
    for (int u = 0; u < kUnits; ++u) {
      const __m512i even = _mm512_loadu_si512(w + d * w_stride + u * kWide);
      const __m512i odd = _mm512_loadu_si512(w + (d + 1) * w_stride + u * kWide);
      pairs[u][0] = _mm512_unpacklo_epi16(even, odd);
      pairs[u][1] = _mm512_unpackhi_epi16(even, odd);
    }
    for (int turn = 0; kFetch && turn < kTurns; ++turn) ahead.turn();
    for (int r = 0; r < kRows; ++r) {
      const __m512i value = _mm512_set1_epi32(read<int32_t>(x + r * k + d));
      for (int u = 0; u < kUnits; ++u)
        for (int h = 0; h < 2; ++h) sum[r][u][h] = add_pairs(sum[r][u][h], value, pairs[u][h]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int u = 0; u < kUnits; ++u) {
      const int64_t to = (row + r) * m.n + c + u * kWide;
      Vec low, high;
      in_order(sum[r][u], low, high);
      write_y(m, to, low);
      write_y(m, to + kLanes, high);
    }
}

// kUnits * kWide columns from c on. Few rows take them from memory as they come; more would wait for each part in
// their first tile and for nothing in the others, so all of them fetch the part that follows.
template <int kUnits>
inline void pair_columns(const Matmul& m, int64_t c, int64_t next) {
  constexpr int kMost = kUnits == 1 ? kTileRows : kTileRows / 2;
  const uint16_t* all = static_cast<const uint16_t*>(m.w);
  const uint16_t* w = all + place(m.in_panels, m.k, m.n, 0, c);
  const int64_t w_stride = m.in_panels ? kPanel : m.n, tiles = (m.tokens + kMost - 1) / kMost;
  Ahead ahead{reinterpret_cast<const char*>(all + place(m.in_panels, m.k, m.n, 0, next)),
              2 * kPanel * int64_t{sizeof(*w)} / (kTurns * tiles)};
  const bool fetch = m.in_panels && tiles > 1;
  in_heights<kMost>(m.tokens, [&](auto height, int64_t r) {
    if (fetch) pair_tile<height, kUnits, true>(m, r, w, w_stride, c, ahead);
    else pair_tile<height, kUnits, false>(m, r, w, w_stride, c, ahead);
  });
}

void paired(const Matmul& m, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + kPanel <= end; c += kPanel) pair_columns<2>(m, c, c + kPanel < end ? c + kPanel : m.after);
  for (; c < end; c += kWide) pair_columns<1>(m, c, m.after);
}

// Pairs of rows of w as bfloat16, exactly: kVecs vectors of columns, each with both of a column's numbers.

template <int kVecs>
inline void number_pairs(uint32_t* to, const int8_t* w, int64_t stride, int64_t count, int32_t, Ahead ahead) {
  for (int64_t d = 0; d < count; ++d, w += 2 * stride) {
    for (int turn = 0; turn < kTurns; ++turn) ahead.turn();
    for (int v = 0; v < kVecs; ++v, to += kLanes) {
      const __m512i even = (__m512i)widen(w + v * kLanes), odd = (__m512i)widen(w + stride + v * kLanes);
      const __m512i high = _mm512_and_si512(odd, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000)));
      _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(even, 16), high));
    }
  }
}

// A byte is a pair already; `least` is what a nibble of 0 stands for.
template <int kVecs>
inline void number_pairs(uint32_t* to, const uint8_t* w, int64_t stride, int64_t count, int32_t least, Ahead ahead) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) {  // the index has five bits, of which a nibble has four
    const float number = static_cast<float>(i % 16 + least);
    table[i] = static_cast<uint16_t>(read<uint32_t>(&number) >> 16);
  }
  const __m512i numbers = _mm512_load_si512(table);
  for (int64_t d = 0; d < count; ++d, w += stride) {
    for (int turn = 0; turn < kTurns; ++turn) ahead.turn();
    for (int v = 0; v < kVecs; ++v, to += kLanes) {
      const __m512i byte = (__m512i)bytes(w + v * kLanes);
      const __m512i nibbles = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
      _mm512_store_si512(to, _mm512_permutexvar_epi16(nibbles, numbers));
    }
  }
}

// y[kRows, kVecs vectors of a panel] += (x[kRows, 2 * depth] @ pairs[depth, kVecs vectors]) * scale + sums[kRows] * shift
// On its own: what surrounds it would take registers from the sums.
template <int kRows, int kVecs>
__attribute__((noinline)) void number_tile(const uint16_t* x, int64_t x_stride, const uint32_t* pairs, int64_t depth,
                                           const Factors<kVecs>& factors, const float* sums, int64_t sums_stride,
                                           float* y, Ahead& ahead) {
  Vec sum[kRows][kVecs];
  clear(sum);
  for (int64_t d = 0; d < depth; ++d, pairs += kVecs * kLanes) {
    __m512i weights[kVecs];
    for (int v = 0; v < kVecs; ++v) weights[v] = _mm512_load_si512(pairs + v * kLanes);
    for (int turn = 0; turn < kTurns; ++turn) ahead.turn();
    for (int r = 0; r < kRows; ++r) {
      const __m512i value = _mm512_set1_epi32(read<int32_t>(x + r * x_stride + 2 * d));
      for (int v = 0; v < kVecs; ++v) sum[r][v] = add_pairs(sum[r][v], value, weights[v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) {
      float* to = y + r * kPanel + v * kLanes;
      Vec value = sum[r][v];
      if (factors.scaled) value *= factors.scale[v];
      if (factors.offset) value += sums[r * sums_stride] * factors.shift[v];
      write(to, read<Vec>(to) + value);
    }
}

// kVecs vectors of columns from c on, some groups of rows at a time, or parts of kDeep of one: numbers become pairs once
// for all rows of x. What follows is fetched meanwhile: by whichever of the two takes long.
template <int kVecs, typename W>
inline void number_columns(const Matmul& m, const Packed<W>& w, int64_t c) {
  constexpr int kMost = 24 / kVecs;
  constexpr int64_t kDeep = 96, kPairs = 576;
  alignas(64) static thread_local uint32_t pairs[kPairs * kVecs * kLanes];
  const int64_t tiles = (m.tokens + kMost - 1) / kMost, most = tiles == 1 ? kDeep : kPairs;
  const int64_t step = sizeof(W) * w.stride * w.kPairRows / kTurns, group = m.group / 2;
  float* y = cleared_sums(m.tokens);
  for (int64_t first = 0, stop; first < m.k / 2; first = stop) {
    const int64_t end = (first / group + 1) * group;
    stop = group <= most ? std::min(m.k / 2, first + most / group * group) : std::min(first + most, end);
    const W* from = w.w + place(m.in_panels, w.rows, m.n, first * w.kPairRows, c);
    const char* next = reinterpret_cast<const char*>(from + (stop - first) * w.kPairRows * w.stride);
    number_pairs<kVecs>(pairs, from, w.stride, stop - first, m.offsets == nullptr ? -8 : 0, {next, tiles == 1 ? step : 0});
    Ahead ahead{next, tiles == 1 ? 0 : step / tiles};
    in_heights<kMost>(m.tokens, [&](auto height, int64_t r) {
      for (int64_t at = first, depth; at < stop; at += depth) {
        const int64_t g = at / group, inside = at % group;
        depth = std::min(kDeep, group - inside);
        const float* sums = m.sums == nullptr ? nullptr : m.sums + r * w.groups + g;
        number_tile<height, kVecs>(m.halves + r * m.k + 2 * at, m.k, pairs + (at - first) * kVecs * kLanes, depth,
                                   w.template factors<kVecs>(g, c, inside == 0), sums, w.groups, y + r * kPanel,
                                   ahead);
      }
    });
  }
  for (int64_t r = 0; r < m.tokens; ++r)
    for (int v = 0; v < kVecs; ++v) write_y(m, r * m.n + c + v * kLanes, read<Vec>(y + r * kPanel + v * kLanes));
}

template <typename W>
void number_paired(const Matmul& m, int64_t begin, int64_t end) {
  const Packed<W> w(m);
  int64_t c = begin;
  for (; c + kPanel <= end; c += kPanel) number_columns<4, W>(m, w, c);
  for (; c < end; c += kWide) number_columns<2, W>(m, w, c);
}
#endif

// y[kRows, kCols] = x[kRows, k] @ w[kCols, k] transposed
template <int kRows, int kCols, typename X, typename W>
inline void dots(const X* x, const W* w, int64_t k, float* y, int64_t y_stride, Ahead& ahead) {
  using Terms = Terms<X, W>;
  Vec sum[kRows][kCols];
  clear(sum);
  for (int64_t i = 0; i < k; i += Terms::kStep) {
    decltype(Terms::of_w(w)) weights[kCols];
    for (int c = 0; c < kCols; ++c) weights[c] = Terms::of_w(w + c * k + i);
    for (int c = 0; c < kCols; ++c) ahead.turn();
    for (int r = 0; r < kRows; ++r) {
      const auto values = Terms::of_x(x + r * k + i);
      for (int c = 0; c < kCols; ++c) sum[r][c] = Terms::add(sum[r][c], values, weights[c]);
    }
  }
  float sums[kRows * kCols];
  totals(&sum[0][0], sums, std::integral_constant<int, kRows * kCols>());
  for (int r = 0; r < kRows; ++r) std::memcpy(y + r * y_stride, sums + r * kCols, kCols * sizeof(float));
}

// All of x with row n of a transposed w and those behind it, kRows in all; the ones after these are fetched.
template <int kRows, typename W, typename X>
inline void all_dots(const Matmul& m, const X* x, int64_t n) {
  constexpr int kMost = 4;
  const W* w = static_cast<const W*>(m.w) + n * m.k;
  const int64_t tiles = (m.tokens + kMost - 1) / kMost;
  Ahead ahead{reinterpret_cast<const char*>(w + kRows * m.k), Terms<X, W>::kStep * int64_t{sizeof(W)} / tiles};
  in_heights<kMost>(m.tokens, [&](auto height, int64_t t) {
    constexpr int kCols = kTotals > 1 ? kTotals / height : kRows;
    for (int c = 0; c < kRows; c += kCols)
      dots<height, kCols>(x + t * m.k, w + c * m.k, m.k, m.y + t * m.n + n + c, m.n, ahead);
  });
}

template <typename W, typename X>
void transposed(const Matmul& m, const X* x, int64_t begin, int64_t end) {
  int64_t n = begin;
  if constexpr (kTotals > 1) {
    for (; n < end; n += kTotals) all_dots<kTotals, W>(m, x, n);
  } else {
    if (m.tokens == 1)
      for (; n + 8 <= end; n += 8) all_dots<8, W>(m, x, n);
    for (; n + 3 <= end; n += 3) all_dots<3, W>(m, x, n);
    for (; n < end; ++n) all_dots<1, W>(m, x, n);
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
  return m.transposed ? transposed<W>(m, m.x, begin, end) : columns_of<Plain<W>>(m, begin, end);
}

}  // namespace

void columns(const Matmul& m, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (m.halves != nullptr) switch (m.type) {
      case Type::kInt8: return number_paired<int8_t>(m, begin, end);
      case Type::kInt4: return number_paired<uint8_t>(m, begin, end);
      default: return m.transposed ? transposed<uint16_t>(m, m.halves, begin, end) : paired(m, begin, end);
    }
#endif
  switch (m.type) {
    case Type::kFloat32: return plain<float>(m, begin, end);
    case Type::kBFloat16: return plain<uint16_t>(m, begin, end);
    case Type::kInt8:
      return m.scales == nullptr ? plain<int8_t>(m, begin, end) : columns_of<Packed<int8_t>>(m, begin, end);
    case Type::kInt4: return columns_of<Packed<uint8_t>>(m, begin, end);
  }
}

}  // namespace octavo::ISA
