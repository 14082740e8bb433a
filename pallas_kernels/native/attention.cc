// Paged attention with an online softmax (arXiv 2205.14135): kKeys keys at a time, from absolute positions on, so that
// a query's result has the same bits whatever chunk, bucket or neighbours it comes with.
#include "kernels.h"
#include "vectors.h"

namespace octavo::ISA {
namespace {

constexpr float kMasked = -1e30f;  // finite: exp(kMasked - kMasked) is 1 and not NaN; such weights are zeroed
constexpr int64_t kFewRows = 4;    // up to which keys and values are widened where they are used

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

inline uint16_t rounded(float value) {
  if (value != value) return 0x7fc0;
  const uint32_t bits = read<uint32_t>(&value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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
    for (int64_t i = 0; i < a.value_dim; ++i) out[i] = rounded(values[i]);
  }
}

// The task's queries, scaled, in float32 [count, num_heads, head_dim].
inline void widen_queries(const Attention& a, const Queries& t, float* to) {
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t from = ((t.token + i) * a.q_heads + t.head) * a.head_dim, size = t.num_heads * a.head_dim;
    for (int64_t d = 0; d < size; d += kLanes) {
      const Vec value = a.q_is_bfloat16 ? widen(static_cast<const uint16_t*>(a.q) + from + d)
                                        : widen(static_cast<const float*>(a.q) + from + d);
      write(to + i * size + d, value * a.scale);
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

template <typename W>
inline const W* row_at(const Attention& a, const Queries& t, int64_t position) {
  const int64_t page = a.tables[t.table * a.pages_per_seq + position / a.page_size];
  return static_cast<const W*>(a.pages) + (page * a.page_size + position % a.page_size) * a.width;
}

template <typename W>
inline void find(const Attention& a, const Queries& t, int64_t first, int64_t count, Block<W>& block) {
  const int64_t kv_head = t.head / (a.q_heads / a.kv_heads);
  block.first = first, block.count = count;
  for (int64_t j = 0; j < count; ++j) {
    const W* row = row_at<W>(a, t, first + j);
    block.key[j] = row + kv_head * a.head_stride;
    block.value[j] = block.key[j] + a.value_offset;
    if constexpr (sizeof(W) == 1) {
      block.key_scale[j] = power_of_two(row[a.exponents + 2 * kv_head]);
      block.value_scale[j] = power_of_two(row[a.exponents + 2 * kv_head + 1]);
    }
  }
}

// Asks for the next keys while these are folded: a row's neighbours in a page belong to other heads.
template <typename W>
inline void fetch(const Attention& a, const Queries& t, int64_t first, int64_t count) {
  const int64_t kv_head = t.head / (a.q_heads / a.kv_heads);
  const int64_t bytes = (a.value_offset + a.value_dim) * sizeof(W);
  for (int64_t j = 0; j < count; ++j) {
    const char* from = reinterpret_cast<const char*>(row_at<W>(a, t, first + j) + kv_head * a.head_stride);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b);
  }
}

// scores[r, j] of kRows queries and kCount keys.
template <int kRows, int kCount, typename W>
inline void dots(const float* q, int64_t dim, const W* const* keys, float* scores) {
  Vec sum[kCount][kRows] = {};
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

// One row's scores become weights; its state shrinks to the new highest score. Keys [begin, end) of the block are seen.
template <typename W>
inline void soften(const Attention& a, const Block<W>& block, int64_t begin, int64_t end, float* scores, float* values,
                   float& top, float& sum) {
  Vec score[kKeys / kLanes], highest = splat(top), weighed{};
  Ints seen[kKeys / kLanes], index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  for (int v = 0; v < kKeys / kLanes; ++v, index += static_cast<int32_t>(kLanes)) {
    seen[v] = (index >= static_cast<int32_t>(begin)) & (index < static_cast<int32_t>(end));
    score[v] = read<Vec>(scores + v * kLanes);
    if constexpr (sizeof(W) == 1) score[v] *= read<Vec>(block.key_scale + v * kLanes);
    if (a.softcap != 0) score[v] = capped(score[v], a.softcap);
    score[v] = seen[v] ? score[v] : splat(kMasked);
    highest = score[v] > highest ? score[v] : highest;
  }
  const float before = top;
  top = largest(highest);
  for (int v = 0; v < kKeys / kLanes; ++v) {
    Vec weight = exponential(score[v] - top);
    weight = seen[v] ? weight : Vec{};
    weighed += weight;
    if constexpr (sizeof(W) == 1) {
      const Vec scale = read<Vec>(block.value_scale + v * kLanes);
      weight = seen[v] ? weight * scale : Vec{};
    }
    write(scores + v * kLanes, weight);
  }
  const float shrink = exponential(before - top);
  sum = sum * shrink + total(weighed);
  if (shrink != 1.0f) multiply(values, a.value_dim, shrink);
}

// Folds one block into the state of the task's rows.
template <typename W>
void fold(const Attention& a, const Queries& t, const Block<W>& block, const float* q, float* scores, const State& s) {
  const int64_t rows = t.count * t.num_heads;
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) all_dots<3>(q + r * a.head_dim, a.head_dim, block, scores + r * kKeys);
  for (; r < rows; ++r) all_dots<1>(q + r * a.head_dim, a.head_dim, block, scores + r * kKeys);
  for (r = 0; r < rows; ++r) {
    const int64_t position = t.position + r / t.num_heads;
    const int64_t first = a.window ? larger(position - a.window + 1, 0) : 0;
    soften(a, block, larger(first - block.first, 0), smaller(position + 1 - block.first, block.count),
           scores + r * kKeys, s.values + r * a.value_dim, s.top[r], s.sum[r]);
  }
  for (r = 0; r + 3 <= rows; r += 3)
    all_weighed<3>(scores + r * kKeys, block, s.values + r * a.value_dim, a.value_dim);
  for (; r < rows; ++r) all_weighed<1>(scores + r * kKeys, block, s.values + r * a.value_dim, a.value_dim);
}

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

// Folds keys [begin, end), begin a multiple of kKeys, into a state that was cleared.
template <typename W>
void fold_range(const Attention& a, const Queries& t, int64_t begin, int64_t end, const float* q, const State& s,
                float* scratch) {
  float *scores = scratch, *panel = scratch + kTaskRows * kKeys;
  const bool few = t.count * t.num_heads <= kFewRows;
  Block<W> block;
  Block<float> wide;
  for (int64_t first = begin; first < end; first += kKeys) {
    const int64_t next = first + kKeys;
    find(a, t, first, smaller(kKeys, end - first), block);
    if (next < end) fetch<W>(a, t, next, smaller(kKeys, end - next));
    if (few) {
      fold(a, t, block, q, scores, s);
    } else {
      widen_block(a, block, panel, wide);
      fold(a, t, wide, q, scores, s);
    }
  }
}

void fold_keys(const Attention& a, const Queries& t, int64_t begin, int64_t end, const float* q, const State& s,
               float* scratch) {
  switch (a.type) {
    case Type::kFloat32: return fold_range<float>(a, t, begin, end, q, s, scratch);
    case Type::kBFloat16: return fold_range<uint16_t>(a, t, begin, end, q, s, scratch);
    case Type::kInt8: return fold_range<int8_t>(a, t, begin, end, q, s, scratch);
    case Type::kInt4: return;  // no pages are
  }
}

// The first key of the task's first query, rounded down to a block.
inline int64_t first_key(const Attention& a, const Queries& t) {
  return a.window ? larger(t.position - a.window + 1, 0) / kKeys * kKeys : 0;
}

}  // namespace

void attend(const Attention& a, const Queries& t, float* scratch) {
  const int64_t rows = t.count * t.num_heads, end = t.position + t.count;
  float* q = scratch;
  const State all = state_at(q + kTaskRows * a.head_dim, rows);
  const State part = state_at(q + kTaskRows * a.head_dim + state_floats(a, kTaskRows), rows);
  float* rest = q + kTaskRows * a.head_dim + 2 * state_floats(a, kTaskRows);
  widen_queries(a, t, q);
  clear(a, all, rows);
  for (int64_t begin = first_key(a, t); begin < end; begin = (begin / kPart + 1) * kPart) {
    clear(a, part, rows);
    fold_keys(a, t, begin, smaller((begin / kPart + 1) * kPart, end), q, part, rest);
    for (int64_t r = 0; r < rows; ++r) join(a, all, part, r);
  }
  for (int64_t r = 0; r < rows; ++r) finish(a, all, r, t.token + r / t.num_heads, t.head + r % t.num_heads);
}

void attend_part(const Attention& a, const Queries& t, int64_t part, float* state, float* scratch) {
  const State s = state_at(state, t.num_heads);
  widen_queries(a, t, scratch);
  clear(a, s, t.num_heads);
  const int64_t begin = larger(first_key(a, t), part * kPart), end = smaller((part + 1) * kPart, t.position + 1);
  fold_keys(a, t, begin, end, scratch, s, scratch + kTaskRows * a.head_dim);
}

void merge(const Attention& a, const Queries& t, int64_t parts, float* states) {
  const State all = state_at(states, t.num_heads);
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t r = 0; r < t.num_heads; ++r) join(a, all, state_at(states + p * state_floats(a, t.num_heads), t.num_heads), r);
  for (int64_t r = 0; r < t.num_heads; ++r) finish(a, all, r, t.token, t.head + r);
}

}  // namespace octavo::ISA
