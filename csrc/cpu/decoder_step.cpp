// A few new positions of each sequence through a stack of Llama decoder layers, float32, keys and
// values cached: y = x + Wo attention(norm(x)), x = y + Wd (silu(Wg norm(y)) * (Wu norm(y))); then
// the norm behind the last one.
//
// A few rows meet each weight once, so reading the weights is the work, and starting threads and
// operators is what costs beside it: four passes over the pool a layer, in each of which a thread
// goes from a norm that it computes itself to its share of the outputs. In the first a thread takes
// whole key heads, from their projections through rotation and cache to what the queries see.
//
// Work: 2 operations a weight and row, 4 a cached number and query row. Fewest bytes: all weights
// of the layers and the cached keys and values, read once.

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/gated_ffn_rows.h"
#include "cpu/lane_rows.h"
#include "cpu/multiversion.h"
#include "cpu/registration.h"

namespace calm {
namespace {

typedef Vector<float> Lanes16;
constexpr int kLanes = 16;

// Rows [num_rows, size], dense.
struct DenseRows {
  const float* data;
  int64_t num_rows;
  int64_t size;
};

// Some outputs of a linear layer for all rows: weight [count, size], to[row * stride + output].
struct Outputs {
  const float* weight;
  int64_t count;
  float* to;
  int64_t stride;
};

// One output of some rows: to[row * stride] = weight times row
template <int kRows>
CALM_INLINE void multiply_output(const float* weight, const DenseRows& x, int64_t row, float* to,
                                 int64_t stride) {
  // The next outputs' weights lie behind this one's: fetched this far ahead they are there in time,
  // page borders or not, where weights come from memory.
  constexpr int64_t kAhead = 512;
  Lanes16 sums[kRows]{};
  for_lanes<float>(x.size, [&](int64_t k, auto count) __attribute__((always_inline)) {
    const Lanes16 left = load_lanes<float>(weight + k, count);
    __builtin_prefetch(weight + k + kAhead);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r] += left * load_lanes<float>(x.data + (row + r) * x.size + k, count);
    }
  });
  for (int r = 0; r < kRows; ++r) to[(row + r) * stride] = sum_lanes<float>(sums[r]);
}

CALM_MULTIVERSION void multiply(const DenseRows& x, const Outputs& outputs) {
  for (int64_t o = 0; o < outputs.count; ++o) {
    const float* const weight = outputs.weight + o * x.size;
    float* const to = outputs.to + o;
    int64_t row = 0;
    for (; row + 4 <= x.num_rows; row += 4) {
      multiply_output<4>(weight, x, row, to, outputs.stride);
    }
    for (; row + 2 <= x.num_rows; row += 2) {
      multiply_output<2>(weight, x, row, to, outputs.stride);
    }
    if (row < x.num_rows) multiply_output<1>(weight, x, row, to, outputs.stride);
  }
}

// Rotary embedding of one head: (x, y) of each pair of halves turned by its angle.
void rotate(float* head, const float* cos, const float* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i];
    const float high = head[i + half];
    head[i] = low * cos[i] + high * sin[i];
    head[i + half] = high * cos[i + half] + low * sin[i + half];
  }
}

// What one query sees: softmax(scale * keys query) values, over `count` positions of `width`.
struct Query {
  const float* query;
  const float* keys;
  const float* values;
  float* seen;
  float* weights;  // [count], working memory
  int64_t count;
  int64_t width;
  float scale;
};

CALM_MULTIVERSION void attend(const Query& q) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < q.count; ++j) {
    Lanes16 sum{};
    for_lanes<float>(q.width, [&](int64_t i, auto count) __attribute__((always_inline)) {
      sum += load_lanes<float>(q.query + i, count) *
             load_lanes<float>(q.keys + j * q.width + i, count);
    });
    q.weights[j] = sum_lanes<float>(sum) * q.scale;
    largest = std::max(largest, q.weights[j]);
  }
  float total = 0.0f;
  for_lanes<float>(q.count, [&](int64_t j, auto count) __attribute__((always_inline)) {
    const Lanes16 weights = exponential_lanes(load_lanes<float>(q.weights + j, count) - largest);
    store_lanes<float>(q.weights + j, weights, count);
    for (int i = 0; i < count; ++i) total += weights[i];
  });
  const float inverse = 1.0f / total;
  for_lanes<float>(q.width, [&](int64_t i, auto count) __attribute__((always_inline)) {
    Lanes16 sum{};
    for (int64_t j = 0; j < q.count; ++j) {
      sum += q.weights[j] * load_lanes<float>(q.values + j * q.width + i, count);
    }
    store_lanes<float>(q.seen + i, sum * inverse, count);
  });
}

// product = silu(product) * up, of some outputs of all rows
CALM_MULTIVERSION void gate(float* product, const float* up, int64_t num_rows, int64_t stride,
                            int64_t count) {
  for (int64_t r = 0; r < num_rows; ++r) {
    float* const row = product + r * stride;
    for_lanes<float>(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Lanes16 v = load_lanes<float>(row + i, lanes);
      const Lanes16 factor = load_lanes<float>(up + r * stride + i, lanes);
      store_lanes<float>(row + i, v / (1.0f + exponential_lanes(-v)) * factor, lanes);
    });
  }
}

// function(first, count) for shares of [0, size), one a thread, in whole vectors.
template <typename Function>
void for_shares(int64_t size, const Function& function) {
  const int64_t vectors = (size + kLanes - 1) / kLanes;
  torch::stable::parallel_for(0, vectors, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes;
    function(first, std::min(end * kLanes, size) - first);
  });
}

const float* data_of(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

// The RMSNorm of all rows, in this thread's own memory.
DenseRows normed(const float* x, const Tensor& weight, double eps, int64_t num_rows,
                 std::vector<float>& memory) {
  const int64_t size = weight.size(0);
  memory.resize(static_cast<size_t>(num_rows * (size + 1)));
  float* const rstd = memory.data() + num_rows * size;
  rms_norm<float>(RmsNormRows<float>{x, data_of(weight), memory.data(), rstd, num_rows, size, eps});
  return {memory.data(), num_rows, size};
}

// to = x + weight rows, by shares of the outputs.
void add_product(const DenseRows& rows, const Tensor& weight, const float* x, float* to) {
  const int64_t size = weight.size(0);
  for_shares(size, [&](int64_t first, int64_t count) {
    multiply(rows, {data_of(weight) + first * rows.size, count, to + first, size});
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      for (int64_t i = first; i < first + count; ++i) to[r * size + i] += x[r * size + i];
    }
  });
}

// Weights of a layer, in the order in which they come.
struct Layer {
  static constexpr size_t kTensors = 9;

  const Tensor& norm;
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const Tensor& out;
  const Tensor& post_norm;
  const Tensor& gate;
  const Tensor& up;
  const Tensor& down;
  double eps;
  double post_eps;
};

// Cached keys and values of a layer, [batch, key_heads, capacity, width], and where to go on:
// `steps` new positions of every sequence, from `position` on.
struct Cache {
  float* keys;
  float* values;
  int64_t batch;
  int64_t steps;
  int64_t key_heads;
  int64_t capacity;
  int64_t width;
  int64_t position;
  const int64_t* filling;
  const float* cos;
  const float* sin;
  float scale;

  int64_t num_rows() const { return batch * steps; }
};

// seen [batch * steps, heads * width] = attention(norm(x)); the new keys and values join the cache.
void attend_rows(const float* x, const Layer& layer, const Cache& cache, float* seen) {
  const int64_t width = cache.width;
  const int64_t hidden_size = layer.norm.size(0);
  const int64_t seen_size = layer.query.size(0);
  const int64_t group = seen_size / (cache.key_heads * width);
  torch::stable::parallel_for(0, cache.key_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory;
    const DenseRows rows = normed(x, layer.norm, layer.eps, cache.num_rows(), memory);
    const int64_t query_size = group * width;
    const int64_t stride = query_size + 2 * width;
    std::vector<float> heads(static_cast<size_t>(cache.num_rows() * stride));
    std::vector<float> weights(static_cast<size_t>(cache.position + cache.steps));
    for (int64_t h = begin; h < end; ++h) {
      float* const queries = heads.data();
      float* const new_key = queries + query_size;
      float* const new_value = new_key + width;
      multiply(rows,
               {data_of(layer.query) + h * query_size * hidden_size, query_size, queries, stride});
      multiply(rows, {data_of(layer.key) + h * width * hidden_size, width, new_key, stride});
      multiply(rows, {data_of(layer.value) + h * width * hidden_size, width, new_value, stride});
      for (int64_t row = 0; row < cache.num_rows(); ++row) {
        const int64_t b = row / cache.steps;
        const int64_t slot = cache.position + row % cache.steps;
        const int64_t first = cache.filling[b];
        const int64_t place = slot - first;
        float* const to = seen + row * seen_size + h * query_size;
        if (place < 0) {  // before the sequence begins
          std::fill_n(to, query_size, 0.0f);
          continue;
        }
        const float* const cos = cache.cos + place * width;
        const float* const sin = cache.sin + place * width;
        const int64_t of_head = (b * cache.key_heads + h) * cache.capacity * width;
        float* const keys = cache.keys + of_head;
        float* const values = cache.values + of_head;
        rotate(new_key + row * stride, cos, sin, width);
        std::copy_n(new_key + row * stride, width, keys + slot * width);
        std::copy_n(new_value + row * stride, width, values + slot * width);
        for (int64_t g = 0; g < group; ++g) {
          float* const query = queries + row * stride + g * width;
          rotate(query, cos, sin, width);
          attend({query, keys + first * width, values + first * width, to + g * width,
                  weights.data(), place + 1, width, cache.scale});
        }
      }
    }
  });
}

// Working memory of one call.
struct Memory {
  std::vector<float> seen;
  std::vector<float> middle;
  std::vector<float> product;
};

// x [batch * steps, H] to to, which may be x
void run_layer(const float* x, const Layer& layer, const Cache& cache, Memory& memory, float* to) {
  const int64_t num_rows = cache.num_rows();
  const int64_t hidden_size = layer.norm.size(0);
  const int64_t seen_size = layer.query.size(0);
  const int64_t size = layer.gate.size(0);
  memory.seen.resize(static_cast<size_t>(num_rows * seen_size));
  memory.middle.resize(static_cast<size_t>(num_rows * hidden_size));
  memory.product.resize(static_cast<size_t>(2 * num_rows * size));
  attend_rows(x, layer, cache, memory.seen.data());
  add_product({memory.seen.data(), num_rows, seen_size}, layer.out, x, memory.middle.data());
  for_shares(size, [&](int64_t first, int64_t count) {
    std::vector<float> own;
    const DenseRows rows =
        normed(memory.middle.data(), layer.post_norm, layer.post_eps, num_rows, own);
    float* const gates = memory.product.data() + first;
    float* const ups = gates + num_rows * size;
    multiply(rows, {data_of(layer.gate) + first * hidden_size, count, gates, size});
    multiply(rows, {data_of(layer.up) + first * hidden_size, count, ups, size});
    gate(gates, ups, num_rows, size, count);
  });
  add_product({memory.product.data(), num_rows, size}, layer.down, memory.middle.data(), to);
}

Tensor decoder_step(const Tensor& x_in, std::vector<Tensor> weights, Tensor keys, Tensor values,
                    const Tensor& position, const Tensor& filling, const Tensor& cos,
                    const Tensor& sin, std::vector<double> eps, double scale) {
  const Tensor x = torch::stable::contiguous(x_in);
  const int64_t num_rows = x.size(0);
  Tensor out = torch::stable::new_empty(x, {num_rows, x.size(1)});
  if (num_rows == 0) return out;
  const int64_t batch = keys.size(1);
  const size_t num_layers = static_cast<size_t>(keys.size(0));
  STD_TORCH_CHECK(
      weights.size() == num_layers * Layer::kTensors + 1 && eps.size() == 2 * num_layers + 1,
      "decoder_step: expected weights and eps of ", num_layers, " layers and of a norm; got ",
      weights.size(), " and ", eps.size());
  const int64_t cached = keys.numel() / keys.size(0);
  const float* in = data_of(x);
  float* const result = out.mutable_data_ptr<float>();
  Memory memory;
  for (size_t i = 0; i < num_layers; ++i) {
    const Tensor* const w = weights.data() + i * Layer::kTensors;
    const int64_t first = static_cast<int64_t>(i) * cached;
    const Layer layer{w[0], w[1], w[2], w[3],       w[4],          w[5],
                      w[6], w[7], w[8], eps[2 * i], eps[2 * i + 1]};
    const Cache cache{keys.mutable_data_ptr<float>() + first,
                      values.mutable_data_ptr<float>() + first,
                      batch,
                      num_rows / batch,
                      keys.size(2),
                      keys.size(3),
                      keys.size(4),
                      *position.const_data_ptr<int64_t>(),
                      filling.const_data_ptr<int64_t>(),
                      data_of(cos),
                      data_of(sin),
                      static_cast<float>(scale)};
    run_layer(in, layer, cache, memory, result);
    in = result;
  }
  std::vector<float> own;
  const DenseRows rows = normed(in, weights.back(), eps.back(), num_rows, own);
  std::copy_n(rows.data, num_rows * rows.size, result);
  return out;
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("decoder_step", TORCH_BOX(&calm::decoder_step));
}
