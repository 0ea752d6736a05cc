// Layers one after the other over rows, float32, without gradients: linear layers, gated ones and
// norms, from weights that were packed beforehand.
//
// A task takes a slab of rows through all layers, so that activations stay in its L2 and no thread
// waits for another between layers: with a few hundred rows, waiting and packing cost a third of
// the time of separate products. Weights come as panels of 32 outputs, [K, 32] each, read in order;
// a panel is multiplied by all tiles of up to twelve rows while it is in L1 or L2. What follows the
// product (bias, SiLU, gate, residual) is done on a tile that is still in L1. Every number is
// summed in one order, whatever the slabs.
//
// Work: 2 K N operations a row and layer. Fewest bytes: rows read and written, weights read once;
// here once a slab.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/energy_head_rows.h"
#include "cpu/gated_ffn_rows.h"
#include "cpu/large_pages.h"
#include "cpu/matmul.h"
#include "cpu/multiversion.h"
#include "cpu/registration.h"
#include "cpu/tile_product.h"

namespace calm {
namespace {

constexpr int kPanel = kTileColumns;
constexpr int kHalf = kPanel / 2;
// A slab's three buffers may take half of an L2 of 1 MB; the weights pass through the rest.
constexpr int64_t kSlabBytes = int64_t{1} << 19;
constexpr int64_t kMostSlabRows = 96;
constexpr int64_t kMaxStep = 384;

// As in reference/row_layers.py.
enum class Kind : int64_t { kLayerNorm, kRmsNorm, kLinear, kLinearSilu, kGated, kAddLinear };

struct Layer {
  Kind kind;
  const float* weight;  // panels [N / 32, K, 32], or of a norm [size]
  const float* bias;    // [num_biases, N], or of a norm [size]
  int64_t depth;        // K, or the size of a norm
  int64_t num_panels = 0;
  int64_t num_biases = 1;
  double eps = 0.0;

  bool is_norm() const { return kind == Kind::kLayerNorm || kind == Kind::kRmsNorm; }
  // Numbers a row of the result, filled up to whole panels.
  int64_t width() const {
    if (is_norm()) return depth;
    return num_panels * (kind == Kind::kGated ? kHalf : kPanel);
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

typedef Vector<float> Lanes16;
typedef float Unaligned16 __attribute__((vector_size(64), aligned(4)));

CALM_INLINE Lanes16 load(const float* from) { return *reinterpret_cast<const Unaligned16*>(from); }
CALM_INLINE void store(float* to, const Lanes16& v) { *reinterpret_cast<Unaligned16*>(to) = v; }

// tile = rows times one panel, in steps of equal length: rounding grows with the length of a chain
// of additions.
void multiply_panel(int64_t num_rows, const float* a, int64_t stride, const float* panel,
                    int64_t depth, float* tile) {
  const int64_t num_steps = std::max<int64_t>(1, ceil_div(depth, kMaxStep));
  for (int64_t step = 0; step < num_steps; ++step) {
    const int64_t k = step * depth / num_steps;
    const int64_t end = (step + 1) * depth / num_steps;
    multiply_tile(num_rows, {a + k, stride, 1}, panel + k * kPanel, end - k, step != 0, tile);
  }
}

CALM_INLINE Lanes16 silu(const Lanes16& v) { return v / (1.0f + exponential_lanes(-v)); }

// Rows of a result on their way through the layers.
struct Rows {
  float* data;
  int64_t stride;
};

// A tile of products becomes part of the layer's result. `to` is that part, `bias` the panel's.
CALM_MULTIVERSION void finish_tile(const Layer& layer, const float* tile, int64_t num_rows,
                                   const float* const* bias, const Rows& to) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const Lanes16 left = load(tile + i * kPanel) + load(bias[i]);
    const Lanes16 right = load(tile + i * kPanel + kHalf) + load(bias[i] + kHalf);
    float* const row = to.data + i * to.stride;
    switch (layer.kind) {
      case Kind::kLinearSilu:
        store(row, silu(left));
        store(row + kHalf, silu(right));
        break;
      case Kind::kGated:
        store(row, silu(left) * right);
        break;
      case Kind::kAddLinear:
        store(row, load(row) + left);
        store(row + kHalf, load(row + kHalf) + right);
        break;
      default:
        store(row, left);
        store(row + kHalf, right);
    }
  }
}

void copy_rows(const Rows& to, const Rows& from, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to.data + i * to.stride, from.data + i * from.stride,
                static_cast<size_t>(size) * sizeof(float));
  }
}

struct Task {
  const std::vector<Layer>& layers;
  int64_t num_rows;  // of all slabs
  int64_t stride;    // of the buffers

  // The row of the biases that row `row` takes: as many rows in turn share one.
  const float* bias_of(const Layer& layer, int64_t row) const {
    if (layer.num_biases == 1) return layer.bias;
    return layer.bias + row / (num_rows / layer.num_biases) * layer.num_panels * kPanel;
  }

  void norm(const Layer& layer, const Rows& from, const Rows& to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const float* const x = from.data + i * from.stride;
      float* const normed = to.data + i * to.stride;
      float mean;
      float rstd;
      if (layer.kind == Kind::kLayerNorm) {
        const RowTarget<float> target{normed, layer.depth};
        run_rows<float>(LayerNormRows<float>{x, layer.weight, layer.bias, target, &mean, &rstd, 1,
                                             layer.depth, layer.eps});
      } else {
        rms_norm<float>(
            RmsNormRows<float>{x, layer.weight, normed, &rstd, 1, layer.depth, layer.eps});
      }
    }
  }

  void multiply(const Layer& layer, const Rows& from, const Rows& to, int64_t first,
                int64_t count) const {
    alignas(64) float tile[kTileRows * kPanel];
    const int64_t num_tiles = ceil_div(count, kTileRows);
    const int64_t panel_width = layer.width() / layer.num_panels;
    const float* bias[kTileRows];
    for (int64_t j = 0; j < layer.num_panels; ++j) {
      const float* const panel = layer.weight + j * layer.depth * kPanel;
      for (int64_t t = 0; t < num_tiles; ++t) {
        // Tiles of about equal height: a low one takes more time a row.
        const int64_t row = t * count / num_tiles;
        const int64_t height = (t + 1) * count / num_tiles - row;
        multiply_panel(height, from.data + row * from.stride, from.stride, panel, layer.depth,
                       tile);
        for (int64_t i = 0; i < height; ++i) {
          bias[i] = bias_of(layer, first + row + i) + j * kPanel;
        }
        finish_tile(layer, tile, height, bias,
                    {to.data + row * to.stride + j * panel_width, to.stride});
      }
    }
  }

  // index[i] = the first column of the largest of `size` numbers that the last layer gives row i;
  // NaN is the largest. That layer is linear, its biases are zero and not read.
  void largest(const Rows& from, int64_t count, int64_t size, int64_t* index) const {
    const Layer& layer = layers.back();
    alignas(64) float tile[kTileRows * kPanel];
    const int64_t num_tiles = ceil_div(count, kTileRows);
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t row = t * count / num_tiles;
      const int64_t height = (t + 1) * count / num_tiles - row;
      float best[kTileRows];
      std::fill_n(best, height, -std::numeric_limits<float>::infinity());
      std::fill_n(index + row, height, 0);
      for (int64_t j = 0; j < layer.num_panels; ++j) {
        multiply_panel(height, from.data + row * from.stride, from.stride,
                       layer.weight + j * layer.depth * kPanel, layer.depth, tile);
        const int64_t columns = std::min<int64_t>(kPanel, size - j * kPanel);
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t c = 0; c < columns; ++c) {
            const float value = tile[i * kPanel + c];
            if (value > best[i] || (std::isnan(value) && !std::isnan(best[i]))) {
              best[i] = value;
              index[row + i] = j * kPanel + c;
            }
          }
        }
      }
    }
  }

  // `count` rows from `first` on, which start at `in`, through some of the layers.
  Rows run(const float* in, int64_t in_width, int64_t first, int64_t count, int64_t num_layers,
           float* memory) const {
    std::array<float*, 3> free{};
    for (int i = 0; i < 3; ++i) free[i] = memory + i * count * stride;
    int next = 0;
    Rows current{const_cast<float*>(in), in_width};
    if (layers.front().is_norm()) {
      // Its input becomes a residual, which is written.
      copy_rows({free[0], stride}, current, count, in_width);
      current = {free[0], stride};
    }
    Rows residual{nullptr, 0};
    const auto other_buffer = [&] {
      while (free[next] == current.data || free[next] == residual.data) next = (next + 1) % 3;
      return free[next];
    };
    for (int64_t i = 0; i < num_layers; ++i) {
      const Layer& layer = layers[static_cast<size_t>(i)];
      if (layer.kind == Kind::kAddLinear) {
        if (current.data == residual.data) {
          // It reads what it writes.
          const Rows to{other_buffer(), stride};
          copy_rows(to, current, count, stride);
          current = to;
        }
        multiply(layer, current, residual, first, count);
        current = residual;
        continue;
      }
      if (layer.is_norm()) residual = current;
      const Rows to{other_buffer(), stride};
      if (layer.is_norm()) {
        norm(layer, current, to, count);
      } else {
        multiply(layer, current, to, first, count);
      }
      current = to;
    }
    return current;
  }
};

std::vector<Layer> parse(const std::vector<int64_t>& kinds, const std::vector<Tensor>& tensors,
                         const std::vector<double>& eps) {
  std::vector<Layer> layers;
  auto tensor = tensors.begin();
  auto next_eps = eps.begin();
  for (const int64_t number : kinds) {
    Layer layer{};
    layer.kind = static_cast<Kind>(number);
    const Tensor& weight = *tensor++;
    layer.weight = weight.const_data_ptr<float>();
    layer.depth = layer.is_norm() ? weight.size(0) : weight.size(1);
    if (layer.is_norm()) layer.eps = *next_eps++;
    if (layer.kind != Kind::kRmsNorm) {
      const Tensor& bias = *tensor++;
      layer.bias = bias.const_data_ptr<float>();
      if (!layer.is_norm()) {
        layer.num_panels = weight.size(0);
        layer.num_biases = bias.size(0);
      }
    }
    layers.push_back(layer);
  }
  return layers;
}

// What a thread keeps from call to call: fresh pages take longer to come than a slab to compute.
thread_local ReusedMemory<float> slab_memory;

// function(task, memory, first row, rows) for every slab.
template <typename Function>
void for_slabs(const std::vector<Layer>& layers, int64_t num_rows, int64_t in_width,
               const Function& function) {
  int64_t width = in_width;
  for (const Layer& layer : layers) width = std::max(width, layer.width());
  // Whole cache lines, and no power of two, at which the rows of a tile would share few sets of L1.
  const int64_t stride = ceil_div(width, kPanel) * kPanel + kHalf;
  const int64_t fitting = kSlabBytes / (3 * stride * static_cast<int64_t>(sizeof(float)));
  const int64_t most_rows = std::clamp<int64_t>(fitting, kTileRows, kMostSlabRows);
  const int64_t num_threads = torch::stable::get_num_threads();
  const int64_t num_slabs =
      std::min(num_rows, ceil_div(num_rows, most_rows * num_threads) * num_threads);
  const Task task{layers, num_rows, stride};
  torch::stable::parallel_for(0, num_slabs, 1, [&](int64_t begin, int64_t end) {
    float* const memory = slab_memory.at_least(3 * most_rows * stride);
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t first = slab * num_rows / num_slabs;
      function(task, memory, first, (slab + 1) * num_rows / num_slabs - first);
    }
  });
}

Tensor row_layers(const Tensor& rows_in, std::vector<int64_t> kinds, std::vector<Tensor> tensors,
                  std::vector<double> eps, int64_t out_width) {
  const Tensor rows = torch::stable::contiguous(rows_in);
  const int64_t width = rows.size(1);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), out_width});
  if (rows.size(0) == 0) return out;
  const std::vector<Layer> layers = parse(kinds, tensors, eps);
  const auto num_layers = static_cast<int64_t>(layers.size());
  const float* const in = rows.const_data_ptr<float>();
  float* const result = out.mutable_data_ptr<float>();
  for_slabs(layers, rows.size(0), width,
            [&](const Task& task, float* memory, int64_t first, int64_t count) {
              const Rows last =
                  task.run(in + first * width, width, first, count, num_layers, memory);
              copy_rows({result + first * out_width, out_width}, last, count, out_width);
            });
  return out;
}

// The first column of the largest number of each row.
Tensor row_layers_argmax(const Tensor& rows_in, std::vector<int64_t> kinds,
                         std::vector<Tensor> tensors, std::vector<double> eps, int64_t out_width) {
  const Tensor rows = torch::stable::contiguous(rows_in);
  const int64_t width = rows.size(1);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0)}, ScalarType::Long);
  if (rows.size(0) == 0) return out;
  const std::vector<Layer> layers = parse(kinds, tensors, eps);
  const auto before_last = static_cast<int64_t>(layers.size()) - 1;
  const float* const in = rows.const_data_ptr<float>();
  int64_t* const index = out.mutable_data_ptr<int64_t>();
  for_slabs(layers, rows.size(0), width,
            [&](const Task& task, float* memory, int64_t first, int64_t count) {
              const Rows last =
                  task.run(in + first * width, width, first, count, before_last, memory);
              task.largest(last, count, out_width, index + first);
            });
  return out;
}

// Lanes [lane, lane + count) of a panel from as many rows of a weight; the rest of them zero.
void pack_lanes(const Tensor& weight, int64_t first_row, int64_t lane, int64_t count, float* to) {
  const int64_t depth = weight.size(1);
  const int64_t valid = std::clamp<int64_t>(weight.size(0) - first_row, 0, count);
  const float* const from = weight.const_data_ptr<float>() + first_row * depth;
  // Sixteen steps at a time: their lines of `from` and of `to` stay in L1.
  constexpr int64_t kChunk = 16;
  for (int64_t start = 0; start < depth; start += kChunk) {
    const int64_t end = std::min(start + kChunk, depth);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = start; k < end; ++k) {
        to[k * kPanel + lane + i] = i < valid ? from[i * depth + k] : 0.0f;
      }
    }
  }
}

// Panels [N / 32, K, 32] of a weight [N, K], or [N / 16, K, 32] of sixteen rows of each of two.
Tensor pack_panels(const Tensor& weight_in, const std::optional<Tensor>& other_in) {
  const Tensor weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> other =
      other_in ? std::optional<Tensor>(torch::stable::contiguous(*other_in)) : std::nullopt;
  const int64_t rows = other ? kHalf : kPanel;
  const int64_t num_panels = ceil_div(weight.size(0), rows);
  Tensor panels = torch::stable::new_empty(weight, {num_panels, weight.size(1), kPanel});
  use_large_pages(panels);
  float* const data = panels.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      float* const to = data + panel * weight.size(1) * kPanel;
      pack_lanes(weight, panel * rows, 0, rows, to);
      if (other) pack_lanes(*other, panel * rows, kHalf, rows, to);
    }
  });
  return panels;
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("pack_panels", TORCH_BOX(&calm::pack_panels));
  m.impl("row_layers", TORCH_BOX(&calm::row_layers));
  m.impl("row_layers_argmax", TORCH_BOX(&calm::row_layers_argmax));
}
