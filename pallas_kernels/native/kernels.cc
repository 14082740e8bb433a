// The table of one instruction set.
#include "kernels.h"

#include "bytes.h"

namespace octavo::ISA {

void columns(const Matmul&, int64_t begin, int64_t end);
void rounded_columns(const Matmul&, int64_t begin, int64_t end);
void round(const Rounded&, int64_t begin, int64_t end);
void gate(const Gate&, int64_t begin, int64_t end);
void norm(const Norm&, int64_t begin, int64_t end);
void rope(const Rope&, int64_t begin, int64_t end);
void greedy(const Greedy&, int64_t begin, int64_t end);
void attend(const Attention&, const Queries&, const Keys* after, float* scratch);
void attend_part(const Attention&, const Queries&, int64_t part, const Keys* after, float* state, float* scratch);
void merge(const Attention&, const Queries&, int64_t parts, float* states);

#ifdef __AVX512BF16__
constexpr bool kHalves = true;
#else
constexpr bool kHalves = false;
#endif

#ifdef OCTAVO_BYTES
constexpr auto kRoundedColumns = rounded_columns;
constexpr auto kRound = round;
#else
constexpr decltype(Kernels::rounded_columns) kRoundedColumns = nullptr;
constexpr decltype(Kernels::round) kRound = nullptr;
#endif

extern const Kernels kernels;
const Kernels kernels{NAME, 2 * LANES, kHalves, columns, kRoundedColumns, kRound, gate, norm,
                      rope, greedy, attend, attend_part, merge};

}  // namespace octavo::ISA
