// A float32 matrix product in AVX-512.
//
// Micro-kernel: 12 x 32 numbers of the result in 24 registers; a step of the sum loads two
// registers of the right operand and broadcasts twelve numbers of the left, so 24 multiply-adds
// meet 14 loads. Both operands are packed into the order in which it reads them. The sum goes in
// steps of up to 256 terms: a panel of the right operand, 32 columns of a step, is 32 KB and stays
// in L2 for all rows of a task; twelve rows of the left operand are 12 KB and stay in L1 for a
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
constexpr int64_t kMaxStep = 256;
// Tiles of a group of rows at most: 132 KB of the left operand.
constexpr int64_t kGroupTiles = 11;
// Panels of a task of sgemm_in_two at most.
constexpr int64_t kTaskPanels = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Equal steps, as few as the limit allows.
int64_t step_size(int64_t depth) {
  return std::max<int64_t>(1, ceil_div(depth, std::max<int64_t>(1, ceil_div(depth, kMaxStep))));
}

#if defined(__x86_64__) && defined(__GNUC__)
#define CALM_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))

typedef float Lanes16 __attribute__((vector_size(64)));
typedef float Unaligned16 __attribute__((vector_size(64), aligned(4)));

// pack_panel for a multiple of four whole lanes whose steps are neighbours: sixteen steps of four
// lanes are transposed in registers. Returns how many steps that were.
CALM_AVX512 int64_t pack_lanes(int num_lanes, const float* from, int64_t lane_stride,
                               int64_t num_steps, float* to) {
  typedef int32_t Indices __attribute__((vector_size(64)));
  constexpr Indices kLow = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr Indices kHigh = kLow + 2;
  constexpr Indices kFirst = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Indices kSecond = kFirst + 2;
  int64_t k = 0;
  for (; k + 16 <= num_steps; k += 16) {
    for (int lane = 0; lane < num_lanes; lane += 4) {
      const float* const source = from + lane * lane_stride + k;
      Lanes16 rows[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        rows[i] = *reinterpret_cast<const Unaligned16*>(source + i * lane_stride);
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
          std::memcpy(to + (k + 4 * q + s) * num_lanes + lane,
                      reinterpret_cast<const char*>(&steps[s]) + 16 * q, 16);
        }
      }
    }
  }
  return k;
}

// out = start + a b for the first kRows of one tile, b's panel and a's rows packed. `start` may be
// null or `out`.
template <int kRows>
CALM_AVX512 void multiply_rows(const float* a, const float* b, int64_t num_steps,
                               const float* start, int64_t start_stride, float* out,
                               int64_t out_stride) {
  Lanes16 sums[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    sums[i][0] = Lanes16{};
    sums[i][1] = Lanes16{};
  }
  for (int64_t k = 0; k < num_steps; ++k) {
    const Lanes16 left = *reinterpret_cast<const Lanes16*>(b);
    const Lanes16 right = *reinterpret_cast<const Lanes16*>(b + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      sums[i][0] += a[i] * left;
      sums[i][1] += a[i] * right;
    }
    a += kTileRows;
    b += kTileColumns;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    if (start != nullptr) {
      sums[i][0] += *reinterpret_cast<const Unaligned16*>(start + i * start_stride);
      sums[i][1] += *reinterpret_cast<const Unaligned16*>(start + i * start_stride + 16);
    }
    *reinterpret_cast<Unaligned16*>(out + i * out_stride) = sums[i][0];
    *reinterpret_cast<Unaligned16*>(out + i * out_stride + 16) = sums[i][1];
  }
}
#else
int64_t pack_lanes(int, const float*, int64_t, int64_t, float*) { return 0; }

template <int kRows>
void multiply_rows(const float* a, const float* b, int64_t num_steps, const float* start,
                   int64_t start_stride, float* out, int64_t out_stride) {
  for (int i = 0; i < kRows; ++i) {
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
  const bool whole = count == kLanes && step_stride == 1;
  const int64_t done = whole ? pack_lanes(kLanes, from, lane_stride, num_steps, to) : 0;
  // Sixteen steps at a time: their lines of `from` and of `to` stay in L1.
  constexpr int64_t kChunk = 16;
  for (int64_t start = done; start < num_steps; start += kChunk) {
    const int64_t end = std::min(start + kChunk, num_steps);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = start; k < end; ++k) {
        to[k * kLanes + i] = from[i * lane_stride + k * step_stride];
      }
    }
  }
}

// A tile that the result does not fill: through a whole one.
void multiply_part(const float* a, const float* b, int64_t num_steps, const float* start,
                   int64_t start_stride, float* out, int64_t out_stride, int64_t num_rows,
                   int64_t num_columns) {
  float whole[kTileRows * kTileColumns];
  if (num_rows <= 4) {
    multiply_rows<4>(a, b, num_steps, nullptr, 0, whole, kTileColumns);
  } else if (num_rows <= 8) {
    multiply_rows<8>(a, b, num_steps, nullptr, 0, whole, kTileColumns);
  } else {
    multiply_rows<kTileRows>(a, b, num_steps, nullptr, 0, whole, kTileColumns);
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t j = 0; j < num_columns; ++j) {
      const float sum = whole[i * kTileColumns + j];
      out[i * out_stride + j] = start == nullptr ? sum : sum + start[i * start_stride + j];
    }
  }
}

// The tile of the result at (row, column) for one step of the sum, from packed operands.
void multiply_at(const Matrix<float>& out, const Matrix<const float>* start, const float* a,
                 const float* b, int64_t num_steps, int64_t row, int64_t column) {
  const int64_t num_rows = std::min<int64_t>(kTileRows, out.rows - row);
  const int64_t num_columns = std::min<int64_t>(kTileColumns, out.columns - column);
  const float* const from =
      start == nullptr ? nullptr : start->data + row * start->row_stride + column;
  const int64_t start_stride = start == nullptr ? 0 : start->row_stride;
  float* const to = out.data + row * out.row_stride + column;
  if (num_rows == kTileRows && num_columns == kTileColumns) {
    multiply_rows<kTileRows>(a, b, num_steps, from, start_stride, to, out.row_stride);
  } else {
    multiply_part(a, b, num_steps, from, start_stride, to, out.row_stride, num_rows, num_columns);
  }
}

// Tiles of a result in the order in which they are made: those of a group of rows for one panel
// after another, so that the group's left operand stays in L2 and a panel for its tiles in L1.
struct TileRange {
  int64_t first_tile;
  int64_t num_tiles;  // of the group
  int64_t begin;      // of the group's tiles in that order
  int64_t end;

  // function(tile, panel)
  template <typename Function>
  void each(const Function& function) const {
    int64_t panel = begin / num_tiles;
    int64_t tile = begin % num_tiles;
    for (int64_t i = begin; i < end; ++i) {
      function(first_tile + tile, panel);
      if (++tile == num_tiles) {
        tile = 0;
        ++panel;
      }
    }
  }
};

// function(range) for all tiles; threads get equal numbers of them, whatever the groups.
template <typename Function>
void for_tile_ranges(int64_t num_tiles, int64_t num_panels, const Function& function) {
  const int64_t num_groups = ceil_div(num_tiles, kGroupTiles);
  torch::stable::parallel_for(
      0, num_tiles * num_panels, kGroupTiles, [&](int64_t begin, int64_t end) {
        for (int64_t group = 0; group < num_groups; ++group) {
          const int64_t first = group * num_tiles / num_groups;
          const int64_t count = (group + 1) * num_tiles / num_groups - first;
          const int64_t start = first * num_panels;
          const int64_t from = std::max(begin - start, int64_t{0});
          const int64_t to = std::min(end - start, count * num_panels);
          if (from < to) function(TileRange{first, count, from, to});
        }
      });
}

// Twelve rows from `row` on and `count` steps from `first` on, in the order of the micro-kernel.
void pack_tile(const Matrix<const float>& a, int64_t row, int64_t first, int64_t count, float* to) {
  const int64_t num_rows = std::min<int64_t>(kTileRows, a.rows - row);
  const float* const from = a.data + row * a.row_stride + first * a.column_stride;
  pack_panel<kTileRows>(from, a.row_stride, a.column_stride, count, num_rows, to);
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

void PackedRight::prepare(int64_t rows, int64_t columns, int64_t step) {
  rows_ = rows;
  columns_ = columns;
  num_panels_ = ceil_div(columns_, kTileColumns);
  step_ = step;
  data_.at_least(rows_ * num_panels_ * kTileColumns);
}

void PackedRight::prepare_in_two(int64_t rows, int64_t columns) {
  prepare(rows, columns, step_size(ceil_div(rows, 2)));
}

void PackedRight::pack(const Matrix<const float>& b) {
  prepare(b.rows, b.columns, step_size(b.rows));
  fill(b);
}

void PackedRight::pack_in_two(const Matrix<const float>& b) {
  prepare_in_two(b.rows, b.columns);
  fill(b);
}

void PackedRight::fill(const Matrix<const float>& b) {
  const int64_t num_steps = ceil_div(rows_, step_);
  torch::stable::parallel_for(0, num_steps * num_panels_, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / num_panels_ * step_;
      const int64_t count = std::min(step_, rows_ - first);
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
  const int64_t step = b.step();
  const int64_t num_steps = ceil_div(depth, step);
  float* const packed = left.at_least(num_tiles * kTileRows * depth);
  // The steps of a tile lie together: in memory, too, a thread's rows are its own.
  const auto packed_rows = [&](int64_t first, int64_t tile) {
    return packed + (tile * depth + first) * kTileRows;
  };
  torch::stable::parallel_for(0, num_tiles * num_steps, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / num_steps;
      const int64_t first = task % num_steps * step;
      const int64_t count = std::min(step, depth - first);
      pack_tile(a, tile * kTileRows, first, count, packed_rows(first, tile));
    }
  });
  const Matrix<const float> so_far{out.data, out.rows, out.columns, out.row_stride};
  const auto add_step = [&](int64_t first, int64_t tile, int64_t panel) {
    const int64_t count = std::min(step, depth - first);
    multiply_at(out, first == 0 ? start : &so_far, packed_rows(first, tile),
                b.panel(first, count, panel), count, tile * kTileRows, panel * kTileColumns);
  };
  for_tile_ranges(num_tiles, num_panels, [&](const TileRange& range) {
    for (int64_t first = 0; first < depth; first += step) {
      range.each([&](int64_t tile, int64_t panel) { add_step(first, tile, panel); });
    }
  });
}

void sgemm_in_two(const Matrix<float>& lower, const Matrix<float>& upper, bool adds,
                  const Matrix<const float>& a, const PackedRight& b, ReusedMemory<float>& left) {
  const int64_t depth = b.rows();
  const int64_t num_tiles = ceil_div(lower.rows, kTileRows);
  const int64_t num_panels = ceil_div(lower.columns, kTileColumns);
  const int64_t step = b.step();
  const int64_t num_steps = ceil_div(depth, step);
  float* const packed = left.at_least(num_tiles * kTileRows * depth);
  const auto packed_rows = [&](int64_t first, int64_t count, int64_t tile) {
    return packed + (first * num_tiles + tile * count) * kTileRows;
  };
  torch::stable::parallel_for(0, num_steps * num_tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / num_tiles * step;
      const int64_t tile = task % num_tiles;
      const int64_t count = std::min(step, depth - first);
      pack_tile(a, tile * kTileRows, first, count, packed_rows(first, count, tile));
    }
  });
  const int64_t row_tasks = ceil_div(num_tiles, kGroupTiles);
  const int64_t column_tasks = ceil_div(num_panels, kTaskPanels);
  const int64_t tasks = row_tasks * column_tasks;
  torch::stable::parallel_for(0, 2 * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t half = task / tasks;
      const int64_t row_task = task % tasks / column_tasks;
      const int64_t column_task = task % column_tasks;
      const int64_t last_tile = (row_task + 1) * num_tiles / row_tasks;
      const int64_t last_panel = (column_task + 1) * num_panels / column_tasks;
      const Matrix<float>& out = half == 0 ? lower : upper;
      const Matrix<const float> so_far = out.read_only();
      const int64_t middle = ceil_div(num_steps, 2) * step;
      const int64_t start = half == 0 ? 0 : middle;
      const int64_t end_of_half = half == 0 ? std::min(middle, depth) : depth;
      for (int64_t first = start; first == start || first < end_of_half; first += step) {
        // None at all in the upper half of a single step: it is written as zero.
        const int64_t count = std::max<int64_t>(0, std::min(step, end_of_half - first));
        const bool starts = !adds && first == start;
        for (int64_t j = column_task * num_panels / column_tasks; j < last_panel; ++j) {
          for (int64_t i = row_task * num_tiles / row_tasks; i < last_tile; ++i) {
            multiply_at(out, starts ? nullptr : &so_far, packed_rows(first, count, i),
                        b.panel(first, count, j), count, i * kTileRows, j * kTileColumns);
          }
        }
      }
    }
  });
}

}  // namespace calm
