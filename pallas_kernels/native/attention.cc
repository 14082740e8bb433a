// Paged attention with an online softmax (arXiv 2205.14135): kKeys keys at a time, from absolute positions on, so that
// a query's result has the same bits whatever chunk, bucket or neighbours it comes with.
#include "kernels.h"
#include "vectors.h"

namespace octavo::ISA {
namespace {

constexpr float kMasked = -1e30f;  // finite: exp(kMasked - kMasked) is 1 and not NaN; such weights are zeroed
constexpr int64_t kFewRows = 4;    // up to which keys and values are widened where they are used
constexpr int64_t kKeys = kLanes == 16 ? kMostKeys : 32;  // that are folded at once
constexpr int64_t kPairDim = 1024;                         // longest keys that are multiplied in pairs
constexpr int kPairRows = 10;                              // of a tile of pairs

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What rows (a query and a head) have folded so far, in the caller's memory.
struct State {
  float* top;     // [rows], the highest score
  float* sum;     // [rows], of weights
  float* values;  // [rows, value_dim], weighted
};

inline State state_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

inline void clear(const Attention& a, const State& s, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) s.top[r] = kMasked, s.sum[r] = 0;
  for (int64_t i = 0; i < rows * a.value_dim; ++i) s.values[i] = 0;
}

inline float exponential(float x) { return exponential(splat(x))[0]; }

inline void multiply(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += kLanes) write(values + i, read<Vec>(values + i) * factor);
}

// into = into and then `part`, of one row.
inline void join(const Attention& a, const State& into, const State& part, int64_t r) {
  const float top = part.top[r] > into.top[r] ? part.top[r] : into.top[r];
  const float before = exponential(into.top[r] - top), now = exponential(part.top[r] - top);
  float* to = into.values + r * a.value_dim;
  const float* from = part.values + r * a.value_dim;
  for (int64_t i = 0; i < a.value_dim; i += kLanes)
    write(to + i, read<Vec>(to + i) * before + read<Vec>(from + i) * now);
  into.sum[r] = into.sum[r] * before + part.sum[r] * now;
  into.top[r] = top;
}

// The result of query `query` and head `head`, whose row of the state is r.
inline void finish(const Attention& a, const State& s, int64_t r, int64_t query, int64_t head) {
  float scale = 1, sum = s.sum[r];
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head], top = sink > s.top[r] ? sink : s.top[r];
    scale = exponential(s.top[r] - top);
    sum = sum * scale + exponential(sink - top);
  }
  float* values = s.values + r * a.value_dim;
  multiply(values, a.value_dim, scale / (sum == 0 ? 1.0f : sum));
  const int64_t at = (query * a.q_heads + head) * a.value_dim;
  if (!a.q_is_bfloat16) {
    std::memcpy(static_cast<float*>(a.out) + at, values, a.value_dim * sizeof(float));
  } else {
    uint16_t* out = static_cast<uint16_t*>(a.out) + at;
    for (int64_t i = 0; i < a.value_dim; i += kLanes) narrow(out + i, read<Vec>(values + i));
  }
}

// Whether queries and pages are multiplied in bfloat16, which has int8's numbers exactly.
inline bool in_pairs(const Attention& a) {
#ifdef __AVX512BF16__
  return a.q_is_bfloat16 && a.type != Type::kFloat32 && a.head_dim % (2 * kLanes) == 0 && a.head_dim <= kPairDim &&
         a.value_dim % (2 * kLanes) == 0;
#else
  return false;
#endif
}

// The task's queries in float32 [count, num_heads, head_dim].
inline void widen_queries(const Attention& a, const Queries& t, float* to) {
  if (in_pairs(a)) return;
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t from = ((t.token + i) * a.q_heads + t.head) * a.head_dim, size = t.num_heads * a.head_dim;
    for (int64_t d = 0; d < size; d += kLanes) {
      const Vec value = a.q_is_bfloat16 ? widen(static_cast<const uint16_t*>(a.q) + from + d)
                                        : widen(static_cast<const float*>(a.q) + from + d);
      write(to + i * size + d, value);
    }
  }
}

// Keys that are folded together, and their values.
template <typename W>
struct Block {
  const W* key[kKeys];
  const W* value[kKeys];
  float key_scale[kKeys], value_scale[kKeys];  // int8 pages
  int64_t first, count;                        // position of the first, how many
};

inline float power_of_two(int8_t exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  return read<float>(&bits);
}

// each(j, row) of `count` tokens from position `first` on: where a token's row of its page begins.
template <typename W, typename Each>
inline void rows_from(const Attention& a, const Queries& t, int64_t first, int64_t count, Each each) {
  const int32_t* page = a.tables + t.table * a.pages_per_seq + first / a.page_size;
  for (int64_t j = 0, at = first % a.page_size; j < count; ++page, at = 0) {
    const W* row = static_cast<const W*>(a.pages) + (*page * a.page_size + at) * a.width;
    for (; j < count && at < a.page_size; ++j, ++at, row += a.width) each(j, row);
  }
}

template <typename W>
inline void find(const Attention& a, const Queries& t, int64_t first, int64_t count, Block<W>& block) {
  const int64_t kv_head = t.head / (a.q_heads / a.kv_heads);
  block.first = first, block.count = count;
  rows_from<W>(a, t, first, count, [&](int64_t j, const W* row) {
    block.key[j] = row + kv_head * a.head_stride;
    block.value[j] = block.key[j] + a.value_offset;
    if constexpr (sizeof(W) == 1) {
      block.key_scale[j] = power_of_two(row[a.exponents + 2 * kv_head]);
      block.value_scale[j] = power_of_two(row[a.exponents + 2 * kv_head + 1]);
    }
  });
  if constexpr (sizeof(W) == 1)
    for (int64_t j = count; j < kKeys; ++j) block.key_scale[j] = block.value_scale[j] = 0;
}

// How many of them its first block has.
inline int64_t first_keys(const Keys& k) {
  return smaller(k.first / kKeys * kKeys + kKeys, k.queries.position + k.queries.count) - k.first;
}

inline int64_t kv_heads_of(const Attention& a, const Queries& t) {
  return larger(t.num_heads / (a.q_heads / a.kv_heads), 1);
}

// The next block, asked for a line of the cache at a time while this one is folded: a processor forgets what is asked for
// all at once. A row's neighbours in a page may belong to other tasks' heads.
struct Next {
  const char* rows[kKeys];
  int64_t count, bytes, row, at;
  void turn() {
    if (row == count) return;
    __builtin_prefetch(rows[row] + at, 0, 2);
    at += 64;
    if (at >= bytes) at = 0, ++row;
  }
};

template <typename W>
inline void find_next(const Attention& a, const Queries& t, int64_t first, int64_t count, Next& next) {
  const int64_t kv_head = t.head / (a.q_heads / a.kv_heads);
  next.bytes = ((kv_heads_of(a, t) - 1) * a.head_stride + a.value_offset + a.value_dim) * sizeof(W);
  next.count = count, next.row = next.at = 0;
  rows_from<W>(a, t, first, count, [&](int64_t j, const W* row) {
    next.rows[j] = reinterpret_cast<const char*>(row + kv_head * a.head_stride);
  });
}

// scores[r, j] of kRows queries and kCount keys.
template <int kRows, int kCount, typename W>
inline void dots(const float* q, int64_t dim, const W* const* keys, float* scores) {
  Vec sum[kCount][kRows];
  clear(sum);
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec query[kRows];
    for (int r = 0; r < kRows; ++r) query[r] = read<Vec>(q + r * dim + d);
    for (int j = 0; j < kCount; ++j) {
      const Vec key = widen(keys[j] + d);
      for (int r = 0; r < kRows; ++r) sum[j][r] += query[r] * key;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kCount; ++j) scores[r * kKeys + j] = total(sum[j][r]);
}

template <int kRows, typename W>
inline void all_dots(const float* q, int64_t dim, const Block<W>& block, float* scores) {
  int64_t j = 0;
  for (; j + 4 <= block.count; j += 4) dots<kRows, 4>(q, dim, block.key + j, scores + j);
  for (; j < block.count; ++j) dots<kRows, 1>(q, dim, block.key + j, scores + j);
}

// values[r] += weights[r] @ the block's values, kVecs vectors of them.
template <int kRows, int kVecs, typename W>
inline void weigh(const float* weights, const Block<W>& block, int64_t column, float* values, int64_t dim) {
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = read<Vec>(values + r * dim + column + v * kLanes);
  for (int64_t j = 0; j < block.count; ++j) {
    for (int v = 0; v < kVecs; ++v) {
      const Vec value = widen(block.value[j] + column + v * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][v] += weights[r * kKeys + j] * value;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) write(values + r * dim + column + v * kLanes, sum[r][v]);
}

template <int kRows, typename W>
inline void all_weighed(const float* weights, const Block<W>& block, float* values, int64_t dim) {
  int64_t column = 0;
  for (; column + 4 * kLanes <= dim; column += 4 * kLanes) weigh<kRows, 4>(weights, block, column, values, dim);
  for (; column < dim; column += kLanes) weigh<kRows, 1>(weights, block, column, values, dim);
}

// hyperbolic tangent of scores / softcap, times it (arXiv 2408.00118)
inline Vec capped(Vec score, float softcap) {
  const Vec limit = splat(40.0f);
  Vec x = score * (1.0f / softcap);
  x = x > limit ? limit : x;
  return softcap - (2.0f * softcap) / (exponential(x + x) + 1.0f);
}

// Row r's scores, scaled and capped; what it does not see of the block is kMasked. Returns the highest by lanes.
template <typename W>
inline Vec scaled(const Attention& a, const Queries& t, const Block<W>& block, int64_t r, float* scores) {
  const int64_t position = t.position + r / t.num_heads, first = a.window ? larger(position - a.window + 1, 0) : 0;
  const int32_t begin = static_cast<int32_t>(larger(first - block.first, 0));
  const int32_t end = static_cast<int32_t>(smaller(position + 1 - block.first, block.count));
  Vec highest = splat(kMasked);
  Ints index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  for (int v = 0; v < kKeys / kLanes; ++v, index += static_cast<int32_t>(kLanes)) {
    Vec score = read<Vec>(scores + v * kLanes) * a.scale;
    if constexpr (sizeof(W) == 1) score *= read<Vec>(block.key_scale + v * kLanes);
    if (a.softcap != 0) score = capped(score, a.softcap);
    if (begin > 0 || end < kKeys) score = (index >= begin) & (index < end) ? score : splat(kMasked);
    write(scores + v * kLanes, score);
    highest = score > highest ? score : highest;
  }
  return highest;
}

// All rows' scores become weights, handed to keep(row, weights); their states shrink to the new highest scores. Rows are
// taken a vector of them at a time.
template <typename W, typename Keep>
inline void soften(const Attention& a, const Queries& t, const Block<W>& block, float* scores, const State& s, Keep keep) {
  const int64_t rows = t.count * t.num_heads;
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = smaller(kLanes, rows - first);
    Vec part[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      part[i] = i < count ? scaled(a, t, block, first + i, scores + (first + i) * kKeys) : splat(kMasked);
    alignas(64) float top[kLanes], shrink[kLanes], sum[kLanes];
    tops(part, top);
    for (int64_t i = 0; i < count; ++i) {
      const float before = s.top[first + i];
      s.top[first + i] = top[i] = top[i] > before ? top[i] : before;
      shrink[i] = before - top[i];
    }
    for (int64_t i = count; i < kLanes; ++i) shrink[i] = 0;
    write(shrink, exponential(read<Vec>(shrink)));
    for (int64_t i = 0; i < count; ++i) {
      Vec weights[kKeys / kLanes], weighed{};
      for (int v = 0; v < kKeys / kLanes; ++v) {
        weights[v] = exponential(read<Vec>(scores + (first + i) * kKeys + v * kLanes) - top[i]);
        if (top[i] == kMasked) weights[v] = Vec{};  // it has seen nothing yet
        weighed += weights[v];
        if constexpr (sizeof(W) == 1) weights[v] *= read<Vec>(block.value_scale + v * kLanes);
      }
      part[i] = weighed;
      keep(first + i, weights);
    }
    totals(part, sum, std::integral_constant<int, kLanes>());
    for (int64_t i = 0; i < count; ++i) {
      s.sum[first + i] = s.sum[first + i] * shrink[i] + sum[i];
      if (shrink[i] != 1.0f) multiply(s.values + (first + i) * a.value_dim, a.value_dim, shrink[i]);
    }
  }
}

// Folds one block into the state of the task's rows.
template <typename W>
void fold(const Attention& a, const Queries& t, const Block<W>& block, const float* q, float* scores, const State& s) {
  const int64_t rows = t.count * t.num_heads;
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) all_dots<3>(q + r * a.head_dim, a.head_dim, block, scores + r * kKeys);
  for (; r < rows; ++r) all_dots<1>(q + r * a.head_dim, a.head_dim, block, scores + r * kKeys);
  soften(a, t, block, scores, s, [&](int64_t row, const Vec (&weights)[kKeys / kLanes]) {
    for (int v = 0; v < kKeys / kLanes; ++v) write(scores + row * kKeys + v * kLanes, weights[v]);
  });
  for (r = 0; r + 3 <= rows; r += 3)
    all_weighed<3>(scores + r * kKeys, block, s.values + r * a.value_dim, a.value_dim);
  for (; r < rows; ++r) all_weighed<1>(scores + r * kKeys, block, s.values + r * a.value_dim, a.value_dim);
}

#ifdef __AVX512BF16__
// scores[r, j] of kRows queries, rows of x, and two vectors of keys that stand in pairs of columns.
template <int kRows>
inline void pair_dots(const uint16_t* const* x, int64_t dim, const uint32_t* keys, float* scores) {
  Vec sum[kRows][2];
  clear(sum);
  for (int64_t d = 0; d < dim; d += 2, keys += kKeys) {
    const __m512i key[2] = {_mm512_load_si512(keys), _mm512_load_si512(keys + kLanes)};
    for (int r = 0; r < kRows; ++r) {
      const __m512i query = _mm512_set1_epi32(read<int32_t>(x[r] + d));
      for (int v = 0; v < 2; ++v) sum[r][v] = add_pairs(sum[r][v], query, key[v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) write(scores + r * kKeys + v * kLanes, sum[r][v]);
}

// Keys [kKeys, dim] in pairs of columns, [dim / 2, kKeys]; keys that are not there are 0.
template <typename W>
inline void pair_keys(const Block<W>& block, int64_t dim, uint32_t* to, Next& next) {
  for (int64_t d = 0; d < dim; d += 2 * kLanes)
    for (int64_t first = 0; first < block.count; first += kLanes) {
      __m512i key[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        key[j] = first + j < block.count ? halves(block.key[first + j] + d) : _mm512_setzero_si512();
        next.turn();
      }
      transpose(key);
      for (int64_t i = 0; i < kLanes; ++i) _mm512_store_si512(to + (d / 2 + i) * kKeys + first, key[i]);
    }
}

// values[r] += weights[r] @ the block's values, kWide columns of them.
template <int kRows, typename W>
inline void pair_weigh(const uint16_t* weights, const Block<W>& block, int64_t column, float* values, int64_t dim,
                       Next& next) {
  Vec sum[kRows][2];
  for (int r = 0; r < kRows; ++r)
    in_pair_order(read<Vec>(values + r * dim + column), read<Vec>(values + r * dim + column + kLanes), sum[r]);
  for (int64_t j = 0; j < block.count; j += 2) {
    const __m512i even = halves(block.value[j] + column);
    const __m512i odd = j + 1 < block.count ? halves(block.value[j + 1] + column) : _mm512_setzero_si512();
    const __m512i pairs[2] = {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
    next.turn(), next.turn();
    for (int r = 0; r < kRows; ++r) {
      const __m512i weight = _mm512_set1_epi32(read<int32_t>(weights + r * kKeys + j));
      for (int v = 0; v < 2; ++v) sum[r][v] = add_pairs(sum[r][v], weight, pairs[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    Vec low, high;
    in_order(sum[r], low, high);
    write(values + r * dim + column, low);
    write(values + r * dim + column + kLanes, high);
  }
}

// As `fold`, of bfloat16 queries and bfloat16 or int8 pages: by pairs, weights rounded to bfloat16.
template <typename W>
inline void fold_pairs(const Attention& a, const Queries& t, const Block<W>& block, float* scratch, const State& s,
                       Next& next) {
  const int64_t rows = t.count * t.num_heads;
  alignas(64) static thread_local uint16_t weights[kTaskRows * kKeys];
  alignas(64) static thread_local uint32_t keys[kPairDim / 2 * kKeys];
  const uint16_t* x[kTaskRows];
  for (int64_t r = 0; r < rows; ++r)
    x[r] = static_cast<const uint16_t*>(a.q) +
           ((t.token + r / t.num_heads) * a.q_heads + t.head + r % t.num_heads) * a.head_dim;
  pair_keys(block, a.head_dim, keys, next);
  in_heights<kPairRows>(rows, [&](auto height, int64_t r) {
    for (int64_t j = 0; j < block.count; j += 2 * kLanes)
      pair_dots<height>(x + r, a.head_dim, keys + j, scratch + r * kKeys + j);
  });
  soften(a, t, block, scratch, s, [&](int64_t r, const Vec (&weight)[kKeys / kLanes]) {
    for (int64_t v = 0; v < kKeys / kLanes; v += 2) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)weight[v + 1], (__m512)weight[v]);
      _mm512_store_si512(weights + r * kKeys + v * kLanes, (__m512i)pairs);
    }
  });
  for (int64_t column = 0; column < a.value_dim; column += 2 * kLanes)
    in_heights<kPairRows>(rows, [&](auto height, int64_t r) {
      pair_weigh<height>(weights + r * kKeys, block, column, s.values + r * a.value_dim, a.value_dim, next);
    });
}
#endif

// The block's keys and values in float32, once for many rows.
template <typename W>
inline void widen_block(const Attention& a, const Block<W>& from, float* panel, Block<float>& to) {
  to.first = from.first, to.count = from.count;
  for (int64_t j = 0; j < from.count; ++j) {
    float* key = panel + j * (a.head_dim + a.value_dim);
    float* value = key + a.head_dim;
    const float key_scale = sizeof(W) == 1 ? from.key_scale[j] : 1, value_scale = sizeof(W) == 1 ? from.value_scale[j] : 1;
    for (int64_t d = 0; d < a.head_dim; d += kLanes) write(key + d, widen(from.key[j] + d) * key_scale);
    for (int64_t d = 0; d < a.value_dim; d += kLanes) write(value + d, widen(from.value[j] + d) * value_scale);
    to.key[j] = key, to.value[j] = value;
  }
}

// Folds a block's keys of one KV head into the state of its rows.
template <typename W>
inline void fold_block(const Attention& a, const Queries& t, const Block<W>& block, const float* q, const State& s,
                       float* scratch, Next& next) {
  float *scores = scratch, *panel = scratch + kTaskRows * kKeys;
#ifdef __AVX512BF16__
  if constexpr (!std::is_same_v<W, float>)
    if (in_pairs(a)) return fold_pairs(a, t, block, scores, s, next);
#endif
  while (next.row < next.count) next.turn();
  if (t.count * t.num_heads <= kFewRows) return fold(a, t, block, q, scores, s);
  Block<float> wide;
  widen_block(a, block, panel, wide);
  fold(a, t, wide, q, scores, s);
}

// Folds keys [begin, end), begin a multiple of kKeys, into a state that was cleared.
template <typename W>
void fold_range(const Attention& a, const Queries& t, int64_t begin, int64_t end, const Keys* after, const float* q,
                const State& s, float* scratch) {
  const int64_t kv_heads = kv_heads_of(a, t), heads = t.num_heads / kv_heads;
  Block<W> block;
  Next next{};
  for (int64_t first = begin; first < end; first += kKeys) {
    if (first + kKeys < end) find_next<W>(a, t, first + kKeys, smaller(kKeys, end - first - kKeys), next);
    else if (after != nullptr) find_next<W>(a, after->queries, after->first, first_keys(*after), next);
    else next.row = next.count = 0;
    for (int64_t head = 0; head < t.num_heads; head += heads) {
      Queries one = t;
      one.head += head, one.num_heads = heads;
      find(a, one, first, smaller(kKeys, end - first), block);
      const State rows = {s.top + head, s.sum + head, s.values + head * a.value_dim};
      fold_block(a, one, block, q + head * a.head_dim, rows, scratch, next);
    }
  }
}

void fold_keys(const Attention& a, const Queries& t, int64_t begin, int64_t end, const Keys* after, const float* q,
               const State& s, float* scratch) {
  switch (a.type) {
    case Type::kFloat32: return fold_range<float>(a, t, begin, end, after, q, s, scratch);
    case Type::kBFloat16: return fold_range<uint16_t>(a, t, begin, end, after, q, s, scratch);
    case Type::kInt8: return fold_range<int8_t>(a, t, begin, end, after, q, s, scratch);
    case Type::kInt4: return;  // no pages are
  }
}

// The first key of the task's first query, rounded down to a block.
inline int64_t first_key(const Attention& a, const Queries& t) {
  return a.window ? larger(t.position - a.window + 1, 0) / kKeys * kKeys : 0;
}

}  // namespace

void attend(const Attention& a, const Queries& t, const Keys* after, float* scratch) {
  const int64_t rows = t.count * t.num_heads, end = t.position + t.count;
  float* q = scratch;
  const State all = state_at(q + kTaskRows * a.head_dim, rows);
  const State part = state_at(q + kTaskRows * a.head_dim + state_floats(a, kTaskRows), rows);
  float* rest = q + kTaskRows * a.head_dim + 2 * state_floats(a, kTaskRows);
  widen_queries(a, t, q);
  clear(a, all, rows);
  for (int64_t begin = first_key(a, t), next; begin < end; begin = next) {
    next = (begin / kPart + 1) * kPart;
    const Keys own{t, next};
    clear(a, part, rows);
    fold_keys(a, t, begin, smaller(next, end), next < end ? &own : after, q, part, rest);
    for (int64_t r = 0; r < rows; ++r) join(a, all, part, r);
  }
  for (int64_t r = 0; r < rows; ++r) finish(a, all, r, t.token + r / t.num_heads, t.head + r % t.num_heads);
}

void attend_part(const Attention& a, const Queries& t, int64_t part, const Keys* after, float* state, float* scratch) {
  const State s = state_at(state, t.num_heads);
  widen_queries(a, t, scratch);
  clear(a, s, t.num_heads);
  const int64_t begin = larger(first_key(a, t), part * kPart), end = smaller((part + 1) * kPart, t.position + 1);
  fold_keys(a, t, begin, end, after, scratch, s, scratch + kTaskRows * a.head_dim);
}

void merge(const Attention& a, const Queries& t, int64_t parts, float* states) {
  const State all = state_at(states, t.num_heads);
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t r = 0; r < t.num_heads; ++r) join(a, all, state_at(states + p * state_floats(a, t.num_heads), t.num_heads), r);
  for (int64_t r = 0; r < t.num_heads; ++r) finish(a, all, r, t.token, t.head + r);
}

}  // namespace octavo::ISA
