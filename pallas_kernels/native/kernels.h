// What one instruction set gives: all sources but native.cc are compiled once for each, and that one chooses
// while running. Everything is computed in float32 and in an order that a row's neighbours do not change.
#pragma once
#include <cstdint>

namespace octavo {

enum class Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

constexpr int64_t kRoundedRows = 32;         // of k that are summed as integers, before a scale is applied
constexpr int64_t kRoundedInt4Group = 2048;  // the largest of int4 that rounded rows are multiplied with

// x [tokens, k] as int8 numbers, largest magnitude 127, and a scale for each `group` of a row.
struct Rounded {
  const void* x;
  bool is_bfloat16;  // x; else float32
  int64_t k, group;  // multiples of kRoundedRows
  int8_t* numbers;   // [tokens, k]; null: x is not rounded
  float* scales;     // [tokens, k / group]
  int32_t* sums;     // [tokens, k / kRoundedRows] of numbers
};

// y[t, n] = sum over k of x[t, k] * w[k, n], in the order of k (by pairs with halves) for every t and n.
// With scales, w[k, n] is number * scales[k / group, n] + offsets[k / group, n]. kInt4 keeps two rows a byte, so x has
// its columns, and the sum its order, as the bytes have theirs: of each group rows 0, group / 2, 1, group / 2 + 1, ...
// In panels, a matrix [rows, n] is [n / columns, rows, columns].
struct Matmul {
  const float* x;    // [tokens, k]; null with halves or rounded
  const uint16_t* halves;  // the same in bfloat16, where the instruction set multiplies it by these weights; or null
  const float* sums;       // [tokens, k / group] of x, with halves and offsets
  Rounded rounded;         // the same as int8, for int8 and int4
  const void* w;   // [k, n], [k / 2, n] of kInt4, [n, k] when transposed
  float* y;        // [tokens, n]; null with narrow_y
  uint16_t* narrow_y;  // the same in bfloat16, which goes with rounded and with halves that are not transposed
  int64_t tokens, k, n;
  Type type;
  bool transposed, in_panels;
  const void* scales;   // [k / group, n], or null
  const void* offsets;  // the same, or null: 0, of kInt4 -8 * scale
  Type scales_type;     // kFloat32 or kBFloat16
  int64_t group;        // even for kInt4
  int64_t after;        // column where the thread is likely to go on when it is through; n: nowhere
};

// out[i] = x[2 * i] * sigmoid(x[2 * i]) * x[2 * i + 1], each of `block` numbers, all of one type.
struct Gate {
  const void* x;
  void* out;
  bool is_bfloat16;
  int64_t block;
};

// out[i] = x[i] / sqrt(mean(x[i] ** 2) + eps) * weight[i % turns] of rows of `size` numbers, all but weight of one type.
struct Norm {
  const void* x;        // [rows, size]
  const void* y;        // is added to x before, and the sum rounded; or null
  const float* weight;  // [turns, size]
  void* sum;            // x + y, with y
  void* out;
  bool is_bfloat16;
  int64_t size, turns;
  float eps;
};

// Of each token's KV heads, `turns` vectors of head_dim numbers: its queries, its key, its value. The first `rotated` numbers
// of queries and keys turn by pairs half of that apart: left * cos - right * sin, right * cos + left * sin.
struct Rope {
  const void* x;           // [tokens, heads, turns, head_dim]
  const float *cos, *sin;  // [tokens, rotated], each half the same
  void* q;                 // [tokens, heads, turns - 2, head_dim], of x's type, as kv
  void* kv;                // [tokens, heads, 2, head_dim]
  bool is_bfloat16;
  int64_t heads, turns, head_dim, rotated;
};

// The first of the highest numbers of each row; faulty: one is not finite, and any may be the token.
struct Greedy {
  const float* logits;  // [rows, vocab]
  int32_t* token;
  bool* faulty;
  int64_t vocab;
};

// Attention of queries [tokens, q_heads, head_dim] over pages of rows of `width` elements, a row a token.
struct Attention {
  const void* q;
  const void* pages;
  const int32_t* tables;  // [rows, pages_per_seq]
  const float* sinks;     // [q_heads], or null
  void* out;              // [tokens, q_heads, value_dim], of q's type
  bool q_is_bfloat16;
  Type type;  // of the pages
  int64_t q_heads, kv_heads, head_dim, value_dim;
  int64_t pages_per_seq, page_size, width;
  int64_t head_stride, value_offset;  // from a KV head's key to the next head's, and to its own value
  int64_t exponents;                  // int8 pages: where a row's powers of two begin, key and value of each head
  float scale, softcap;               // softcap 0: none
  int64_t window;                     // 0: none
};

// Some queries of one sequence, the first at `position`, and some query heads of one KV head; or one query and all query
// heads of some KV heads.
struct Queries {
  int64_t table;  // row of `tables`
  int64_t token, count, position;
  int64_t head, num_heads;
};

// Keys from position `first` on that queries see.
struct Keys {
  Queries queries;
  int64_t first;
};

constexpr int64_t kPart = 512;     // keys folded on their own, from a multiple of it; then parts are merged in order
constexpr int64_t kTaskRows = 32;  // queries times heads of one call
constexpr int64_t kMostKeys = 64;  // folded at once, by whoever takes the most

inline int64_t state_floats(const Attention& a, int64_t rows) { return rows * (2 + a.value_dim); }
inline int64_t scratch_floats(const Attention& a) {
  return kTaskRows * (a.head_dim + kMostKeys) + 2 * state_floats(a, kTaskRows) +
         kMostKeys * (a.head_dim + a.value_dim);
}

struct Kernels {
  const char* name;
  int64_t lanes;  // k, n are multiples of it, head_dim and value_dim of half of it
  bool halves;    // bfloat16 times bfloat16, int8 or int4, in even groups, takes x in bfloat16
  void (*columns)(const Matmul&, int64_t begin, int64_t end);  // of y, multiples of `lanes`
  // Those of rounded numbers by int8 or int4, and the rounding of rows of x; null where it has no such products.
  void (*rounded_columns)(const Matmul&, int64_t begin, int64_t end);
  void (*round)(const Rounded&, int64_t begin, int64_t end);
  void (*gate)(const Gate&, int64_t begin, int64_t end);       // of blocks, whose size is a multiple of half of `lanes`
  void (*norm)(const Norm&, int64_t begin, int64_t end);       // of rows, likewise
  void (*rope)(const Rope&, int64_t begin, int64_t end);       // of tokens, likewise half of `rotated`
  void (*greedy)(const Greedy&, int64_t begin, int64_t end);   // of rows
  // Everything that at most kTaskRows queries see. scratch: scratch_floats, of the thread's own; after: whose keys the
  // thread reads next, or null.
  void (*attend)(const Attention&, const Queries&, const Keys* after, float* scratch);
  // What one query sees of keys [kPart * part, kPart * (part + 1)), into state_floats of num_heads rows.
  void (*attend_part)(const Attention&, const Queries&, int64_t part, const Keys* after, float* state, float* scratch);
  // One query's result from the states of its parts, one behind the other; the first is overwritten.
  void (*merge)(const Attention&, const Queries&, int64_t parts, float* states);
};

}  // namespace octavo
