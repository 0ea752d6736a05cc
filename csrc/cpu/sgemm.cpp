// A float32 matrix product in AVX-512.
//
// Micro-kernel: 12 x 32 numbers of the result in 24 registers; a step of the sum loads two
// registers of the right operand and broadcasts twelve numbers of the left, so 24 multiply-adds
// meet 14 loads. Both operands are packed into the order in which it reads them. The sum goes in
// steps of up to 384 terms: a panel of the right operand, 32 columns of a step, is 48 KB and stays
// in L2 for all rows of a task; twelve rows of the left operand are 18 KB and stay in L1 for a
// panel.
//
// Work: 2 M N K operations. On Zen 4 the micro-kernel runs at 95% of the peak of 32 operations a
// cycle; with packing 100 to 103 of 115 GFLOP/s a core, where torch's library, which
// takes AVX2 there, reaches 90 to 98. On CPUs whose library uses AVX-512, this one does not serve.

#include "cpu/sgemm.h"

#include <algorithm>
#include <cstring>

namespace calm {
namespace {

constexpr int kTileRows = 12;
constexpr int kTileColumns = 32;
constexpr int64_t kMaxStep = 512;
// Rows and panels of a task at most: 0.1 milliseconds of work.
constexpr int64_t kTaskTiles = 11;
constexpr int64_t kTaskPanels = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Equal steps, as few as the limit allows.
int64_t step_size(int64_t depth) {
  return std::max<int64_t>(1, ceil_div(depth, std::max<int64_t>(1, ceil_div(depth, kMaxStep))));
}

// to[k, i] = from[i, k] for `count` of kLanes rows; the rest zero.
template <int kLanes>
void pack_panel(const float* from, int64_t lane_stride, int64_t step_stride, int64_t num_steps,
                int64_t count, float* to) {
  if (lane_stride == 1 && count == kLanes) {
    for (int64_t k = 0; k < num_steps; ++k) {
      std::memcpy(to + k * kLanes, from + k * step_stride, kLanes * sizeof(float));
    }
    return;
  }
  if (count < kLanes) std::fill_n(to, num_steps * kLanes, 0.0f);
  // Sixteen steps at a time: their lines of `from` and of `to` stay in L1.
  constexpr int64_t kChunk = 16;
  for (int64_t start = 0; start < num_steps; start += kChunk) {
    const int64_t end = std::min(start + kChunk, num_steps);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = start; k < end; ++k) {
        to[k * kLanes + i] = from[i * lane_stride + k * step_stride];
      }
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
#define CALM_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))

typedef float Lanes16 __attribute__((vector_size(64)));
typedef float Unaligned16 __attribute__((vector_size(64), aligned(4)));

// pack_panel for kTileRows whole rows whose steps are neighbours: sixteen steps of four rows are
// transposed in registers. Returns how many steps that were.
CALM_AVX512 int64_t pack_rows(const float* from, int64_t row_stride, int64_t num_steps, float* to) {
  typedef int32_t Indices __attribute__((vector_size(64)));
  constexpr Indices kLow = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr Indices kHigh = kLow + 2;
  constexpr Indices kFirst = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Indices kSecond = kFirst + 2;
  int64_t k = 0;
  for (; k + 16 <= num_steps; k += 16) {
    for (int row = 0; row < kTileRows; row += 4) {
      const float* const source = from + row * row_stride + k;
      Lanes16 rows[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        rows[i] = *reinterpret_cast<const Unaligned16*>(source + i * row_stride);
      }
      const Lanes16 low = __builtin_shuffle(rows[0], rows[1], kLow);
      const Lanes16 high = __builtin_shuffle(rows[0], rows[1], kHigh);
      const Lanes16 other_low = __builtin_shuffle(rows[2], rows[3], kLow);
      const Lanes16 other_high = __builtin_shuffle(rows[2], rows[3], kHigh);
      // Quarter q of steps[s] is step 4 q + s of the four rows.
      const Lanes16 steps[4] = {__builtin_shuffle(low, other_low, kFirst),
                                __builtin_shuffle(low, other_low, kSecond),
                                __builtin_shuffle(high, other_high, kFirst),
                                __builtin_shuffle(high, other_high, kSecond)};
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          std::memcpy(to + (k + 4 * q + s) * kTileRows + row,
                      reinterpret_cast<const char*>(&steps[s]) + 16 * q, 16);
        }
      }
    }
  }
  return k;
}

// out = start + a b for one tile, b's panel and a's rows packed. `start` may be null or `out`.
CALM_AVX512 void multiply_tile(const float* a, const float* b, int64_t num_steps,
                               const float* start, int64_t start_stride, float* out,
                               int64_t out_stride) {
  Lanes16 sums[kTileRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; ++i) {
    sums[i][0] = Lanes16{};
    sums[i][1] = Lanes16{};
  }
  for (int64_t k = 0; k < num_steps; ++k) {
    const Lanes16 left = *reinterpret_cast<const Lanes16*>(b);
    const Lanes16 right = *reinterpret_cast<const Lanes16*>(b + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kTileRows; ++i) {
      sums[i][0] += a[i] * left;
      sums[i][1] += a[i] * right;
    }
    a += kTileRows;
    b += kTileColumns;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; ++i) {
    if (start != nullptr) {
      sums[i][0] += *reinterpret_cast<const Unaligned16*>(start + i * start_stride);
      sums[i][1] += *reinterpret_cast<const Unaligned16*>(start + i * start_stride + 16);
    }
    *reinterpret_cast<Unaligned16*>(out + i * out_stride) = sums[i][0];
    *reinterpret_cast<Unaligned16*>(out + i * out_stride + 16) = sums[i][1];
  }
}
#else
int64_t pack_rows(const float*, int64_t, int64_t, float*) { return 0; }

void multiply_tile(const float* a, const float* b, int64_t num_steps, const float* start,
                   int64_t start_stride, float* out, int64_t out_stride) {
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kTileColumns; ++j) {
      float sum = 0.0f;
      for (int64_t k = 0; k < num_steps; ++k) {
        sum += a[k * kTileRows + i] * b[k * kTileColumns + j];
      }
      if (start != nullptr) sum += start[i * start_stride + j];
      out[i * out_stride + j] = sum;
    }
  }
}
#endif

// A tile that the result does not fill: through a whole one.
void multiply_part(const float* a, const float* b, int64_t num_steps, const float* start,
                   int64_t start_stride, float* out, int64_t out_stride, int64_t num_rows,
                   int64_t num_columns) {
  float whole[kTileRows * kTileColumns];
  multiply_tile(a, b, num_steps, nullptr, 0, whole, kTileColumns);
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t j = 0; j < num_columns; ++j) {
      const float sum = whole[i * kTileColumns + j];
      out[i * out_stride + j] = start == nullptr ? sum : sum + start[i * start_stride + j];
    }
  }
}

}  // namespace

bool sgemm_serves() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool serves = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq");
  return serves;
#else
  return false;
#endif
}

void PackedRight::pack(const Matrix<const float>& b) {
  rows_ = b.rows;
  columns_ = b.columns;
  num_panels_ = ceil_div(columns_, kTileColumns);
  data_.at_least(rows_ * num_panels_ * kTileColumns);
  const int64_t step = step_size(rows_);
  const int64_t num_steps = ceil_div(rows_, step);
  torch::stable::parallel_for(0, num_steps * num_panels_, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / num_panels_ * step;
      const int64_t count = std::min(step, rows_ - first);
      const int64_t column = task % num_panels_ * kTileColumns;
      pack_panel<kTileColumns>(b.data + first * b.row_stride + column * b.column_stride,
                               b.column_stride, b.row_stride, count,
                               std::min<int64_t>(kTileColumns, columns_ - column),
                               const_cast<float*>(panel(first, count, task % num_panels_)));
    }
  });
}

const float* PackedRight::panel(int64_t first_row, int64_t num_rows, int64_t panel) const {
  return data_.get() + (first_row * num_panels_ + panel * num_rows) * kTileColumns;
}

void sgemm(const Matrix<float>& out, const Matrix<const float>* start, const Matrix<const float>& a,
           const PackedRight& b, ReusedMemory<float>& left) {
  const int64_t depth = b.rows();
  const int64_t num_tiles = ceil_div(out.rows, kTileRows);
  const int64_t num_panels = ceil_div(out.columns, kTileColumns);
  const int64_t step = step_size(depth);
  float* const packed = left.at_least(num_tiles * kTileRows * step);
  const int64_t row_tasks = ceil_div(num_tiles, kTaskTiles);
  const int64_t column_tasks = ceil_div(num_panels, kTaskPanels);
  for (int64_t first = 0; first < depth; first += step) {
    const int64_t count = std::min(step, depth - first);
    torch::stable::parallel_for(0, num_tiles, 4, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tile * kTileRows;
        const int64_t rows = std::min<int64_t>(kTileRows, out.rows - row);
        const float* const from = a.data + row * a.row_stride + first * a.column_stride;
        float* const to = packed + row * count;
        const bool whole = rows == kTileRows && a.column_stride == 1;
        const int64_t done = whole ? pack_rows(from, a.row_stride, count, to) : 0;
        pack_panel<kTileRows>(from + done * a.column_stride, a.row_stride, a.column_stride,
                              count - done, rows, to + done * kTileRows);
      }
    });
    const Matrix<const float> so_far{out.data, out.rows, out.columns, out.row_stride};
    const Matrix<const float>* from = first == 0 ? start : &so_far;
    const auto run = [&](int64_t task) {
      // Tasks of equal size: a thread gets as many of them as another.
      const int64_t first_tile = task / column_tasks * num_tiles / row_tasks;
      const int64_t last_tile = (task / column_tasks + 1) * num_tiles / row_tasks;
      const int64_t first_panel = task % column_tasks * num_panels / column_tasks;
      const int64_t last_panel = (task % column_tasks + 1) * num_panels / column_tasks;
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const float* right = b.panel(first, count, panel);
        const int64_t column = panel * kTileColumns;
        const int64_t columns = std::min<int64_t>(kTileColumns, out.columns - column);
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          const int64_t row = tile * kTileRows;
          const int64_t rows = std::min<int64_t>(kTileRows, out.rows - row);
          const float* const begins =
              from == nullptr ? nullptr : from->data + row * from->row_stride + column;
          const int64_t start_stride = from == nullptr ? 0 : from->row_stride;
          float* const ends = out.data + row * out.row_stride + column;
          const float* const rows_of_a = packed + row * count;
          if (rows == kTileRows && columns == kTileColumns) {
            multiply_tile(rows_of_a, right, count, begins, start_stride, ends, out.row_stride);
          } else {
            multiply_part(rows_of_a, right, count, begins, start_stride, ends, out.row_stride, rows,
                          columns);
          }
        }
      }
    };
    torch::stable::parallel_for(0, row_tasks * column_tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run(task);
    });
  }
}

}  // namespace calm
