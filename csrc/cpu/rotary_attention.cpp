// Causal attention of rotated queries and keys on CPUs, float32, forward and backward.
//
// out = softmax(scale * q k^T) v for every head, q and k turned by their positions' angles; query
// heads in turn share a key head. Heads stay where the projections wrote them, [B, T, heads *
// width], so nothing is transposed or copied in memory. A task is a key head of a sequence: keys
// and values are packed once, then twelve queries at a time meet the keys before them through the
// tiles of tile_product.h. The backward pass recomputes the scores from the logarithm of their sum.
//
// Work: 2 T^2 width operations a head forward, 5 T^2 width backward (half of the square). Fewest
// bytes: queries, keys, values and results (and their gradients), once each.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "cpu/lane_rows.h"
#include "cpu/multiversion.h"
#include "cpu/pooled_tensor.h"
#include "cpu/registration.h"
#include "cpu/rotary_attention.h"
#include "cpu/tile_product.h"
#include "cpu/workspace.h"

namespace calm {
namespace {

constexpr int kPanel = kTileColumns;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// to = from with each pair of halves turned; backward: the gradient of that.
CALM_MULTIVERSION void rotate(const float* from, const float* cos, const float* sin, int64_t width,
                              bool backward, float* to) {
  const int64_t half = width / 2;
  for_lanes<float>(half, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vector<float> low = load_lanes<float>(from + i, lanes);
    const Vector<float> high = load_lanes<float>(from + half + i, lanes);
    const Vector<float> low_cos = load_lanes<float>(cos + i, lanes);
    const Vector<float> low_sin = load_lanes<float>(sin + i, lanes);
    const Vector<float> high_cos = load_lanes<float>(cos + half + i, lanes);
    const Vector<float> high_sin = load_lanes<float>(sin + half + i, lanes);
    const Vector<float> to_low = low * low_cos + (backward ? high * high_sin : -high * low_sin);
    const Vector<float> to_high = high * high_cos + (backward ? -low * low_sin : low * high_sin);
    store_lanes<float>(to + i, to_low, lanes);
    store_lanes<float>(to + half + i, to_high, lanes);
  });
}

// Rows [num_rows, size] as panels of 32 columns, [size / 32][num_rows][32], zero past the last.
void pack_columns(const float* from, int64_t stride, int64_t num_rows, int64_t size, float* to) {
  for (int64_t column = 0; column < size; column += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, size - column);
    for (int64_t r = 0; r < num_rows; ++r, to += kPanel) {
      std::copy_n(from + r * stride + column, count, to);
      std::fill(to + count, to + kPanel, 0.0f);
    }
  }
}

// Rows as columns, thirty-two a panel: [num_rows / 32][size][32], zero past the last.
void pack_rows(const float* from, int64_t stride, int64_t num_rows, int64_t size, float* to) {
  for (int64_t row = 0; row < num_rows; row += kPanel, to += size * kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, num_rows - row);
    if (count < kPanel) std::fill_n(to, size * kPanel, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < size; ++k) to[k * kPanel + i] = from[(row + i) * stride + k];
    }
  }
}

// e^(scale x - shift) of the first `count` numbers, zero up to `limit`; returns their sum.
CALM_MULTIVERSION float exponentials(float* row, int64_t count, int64_t limit, float scale,
                                     float shift) {
  Vector<float> total{};
  for_lanes<float>(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    Vector<float> v = exponential_lanes(load_lanes<float>(row + i, lanes) * scale - shift);
    if constexpr (std::is_same_v<decltype(lanes), int>) {
      for (int j = lanes; j < kRowLanes<float>; ++j) v[j] = 0.0f;
    }
    store_lanes<float>(row + i, v, lanes);
    total += v;
  });
  std::fill(row + count, row + limit, 0.0f);
  return sum_lanes<float>(total);
}

CALM_MULTIVERSION float largest(const float* row, int64_t count) {
  float result = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) result = std::max(result, row[i]);
  return result;
}

CALM_MULTIVERSION float dot(const float* a, const float* b, int64_t size) {
  Vector<float> total{};
  for_lanes<float>(size, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    total += load_lanes<float>(a + i, lanes) * load_lanes<float>(b + i, lanes);
  });
  return sum_lanes<float>(total);
}

// grads = weights (grads - mean) scale, zero from `count` to `limit`.
CALM_MULTIVERSION void softmax_backward(const float* weights, float* grads, int64_t count,
                                        int64_t limit, float mean, float scale) {
  for (int64_t i = 0; i < count; ++i) grads[i] = weights[i] * (grads[i] - mean) * scale;
  std::fill(grads + count, grads + limit, 0.0f);
}

struct Memory {
  ReusedMemory<float> keys;           // [T, width], rotated
  ReusedMemory<float> keys_as_rows;   // of scores: panels of 32 keys, [width, 32]
  ReusedMemory<float> key_columns;    // of the queries' gradients: panels [T, 32]
  ReusedMemory<float> value_columns;  // of the results: panels [T, 32]
  ReusedMemory<float> values_as_rows;
  ReusedMemory<float> grad_keys;  // panels [T, 32]
  ReusedMemory<float> grad_values;
  ReusedMemory<float> queries;       // [12, width], rotated
  ReusedMemory<float> query_panels;  // [12, 32] each
  ReusedMemory<float> grad_panels;
  ReusedMemory<float> weights;  // [12, T]
  ReusedMemory<float> grads;

  int64_t bytes() const {
    return keys.bytes() + keys_as_rows.bytes() + key_columns.bytes() + value_columns.bytes() +
           values_as_rows.bytes() + grad_keys.bytes() + grad_values.bytes() + queries.bytes() +
           query_panels.bytes() + grad_panels.bytes() + weights.bytes() + grads.bytes();
  }
};

// function(first query, queries) for tiles of about equal height.
template <typename Function>
void for_tiles(int64_t length, const Function& function) {
  const int64_t num_tiles = ceil_div(length, kTileRows);
  for (int64_t t = 0; t < num_tiles; ++t) {
    const int64_t first = t * length / num_tiles;
    function(first, (t + 1) * length / num_tiles - first);
  }
}

// One key head of a sequence.
class KeyHead {
 public:
  KeyHead(const AttentionInputs& in, int64_t b, int64_t key_head, Memory& memory)
      : in_(in),
        width_panels_(ceil_div(in.width, kPanel)),
        padded_length_(ceil_div(in.length, kPanel) * kPanel),
        b_(b),
        key_head_(key_head),
        memory_(memory) {
    const int64_t padded = width_panels_ * kPanel;
    float* const keys = memory.keys.at_least(in_.length * in_.width);
    for (int64_t t = 0; t < in_.length; ++t) {
      rotate_row(in.keys.at(b, t, key_head), t, keys + t * in_.width);
    }
    keys_as_rows_ = memory.keys_as_rows.at_least(padded_length_ * in_.width);
    pack_rows(keys, in_.width, in_.length, in_.width, keys_as_rows_);
    queries_ = memory.queries.at_least(kTileRows * in_.width);
    weights_ = memory.weights.at_least(kTileRows * padded_length_);
    value_columns_ = memory.value_columns.at_least(in_.length * padded);
  }

  void forward(const Heads<float>& out, float* log_sums) {
    pack_columns(in_.values.at(b_, 0, key_head_), in_.values.row_stride, in_.length, in_.width,
                 value_columns_);
    alignas(64) float tile[kTileRows * kPanel];
    for (int64_t head = key_head_ * in_.group(); head < (key_head_ + 1) * in_.group(); ++head) {
      for_tiles(in_.length, [&](int64_t first, int64_t count) {
        const int64_t limit = first + count;
        scores(head, first, count);
        float inverse[kTileRows];
        for (int64_t i = 0; i < count; ++i) {
          float* const row = weights_ + i * padded_length_;
          const float shift = largest(row, first + i + 1) * in_.scale;
          const float sum = exponentials(row, first + i + 1, limit, in_.scale, shift);
          inverse[i] = 1.0f / sum;
          log_sums[(b_ * in_.num_heads + head) * in_.length + first + i] = shift + std::log(sum);
        }
        for (int64_t p = 0; p < width_panels_; ++p) {
          multiply_tile(count, {weights_, padded_length_, 1},
                        value_columns_ + p * in_.length * kPanel, limit, false, tile);
          for (int64_t i = 0; i < count; ++i) {
            float* const row = out.at(b_, first + i, head) + p * kPanel;
            const int64_t size = std::min<int64_t>(kPanel, in_.width - p * kPanel);
            for (int64_t k = 0; k < size; ++k) row[k] = tile[i * kPanel + k] * inverse[i];
          }
        }
      });
    }
  }

  void backward(const Heads<const float>& grad_out, const Heads<const float>& out,
                const float* log_sums, const Heads<float>& grad_queries,
                const Heads<float>& grad_keys, const Heads<float>& grad_values) {
    const int64_t panels = width_panels_;
    const int64_t panel_size = in_.length * kPanel;
    float* const key_columns = memory_.key_columns.at_least(panels * panel_size);
    pack_columns(memory_.keys.get(), in_.width, in_.length, in_.width, key_columns);
    float* const values_as_rows = memory_.values_as_rows.at_least(padded_length_ * in_.width);
    pack_rows(in_.values.at(b_, 0, key_head_), in_.values.row_stride, in_.length, in_.width,
              values_as_rows);
    float* const key_sums = memory_.grad_keys.at_least(panels * panel_size);
    float* const value_sums = memory_.grad_values.at_least(panels * panel_size);
    std::fill_n(key_sums, panels * panel_size, 0.0f);
    std::fill_n(value_sums, panels * panel_size, 0.0f);
    float* const query_panels = memory_.query_panels.at_least(panels * kTileRows * kPanel);
    float* const grad_panels = memory_.grad_panels.at_least(panels * kTileRows * kPanel);
    const int64_t padded = padded_length_;
    float* const grads = memory_.grads.at_least(kTileRows * padded);
    alignas(64) float tile[kTileRows * kPanel];
    for (int64_t head = key_head_ * in_.group(); head < (key_head_ + 1) * in_.group(); ++head) {
      for_tiles(in_.length, [&](int64_t first, int64_t count) {
        const int64_t limit = first + count;
        scores(head, first, count);
        pack_columns(queries_, in_.width, count, in_.width, query_panels);
        pack_columns(grad_out.at(b_, first, head), grad_out.row_stride, count, in_.width,
                     grad_panels);
        multiply_panels({grad_out.at(b_, first, head), grad_out.row_stride, 1}, count,
                        values_as_rows, limit, grads);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t t = first + i;
          float* const weights = weights_ + i * padded;
          exponentials(weights, t + 1, limit, in_.scale,
                       log_sums[(b_ * in_.num_heads + head) * in_.length + t]);
          const float mean = dot(grad_out.at(b_, t, head), out.at(b_, t, head), in_.width);
          softmax_backward(weights, grads + i * padded, t + 1, limit, mean, in_.scale);
        }
        for (int64_t p = 0; p < panels; ++p) {
          multiply_tile(count, {grads, padded, 1}, key_columns + p * panel_size, limit, false,
                        tile);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t size = std::min<int64_t>(kPanel, in_.width - p * kPanel);
            // The rotated queries are packed: their rows become those of the gradient.
            std::copy_n(tile + i * kPanel, size, queries_ + i * in_.width + p * kPanel);
          }
          for_tiles(limit, [&](int64_t key, int64_t num_keys) {
            multiply_tile(num_keys, {grads + key, 1, padded}, query_panels + p * count * kPanel,
                          count, true, key_sums + p * panel_size + key * kPanel);
            multiply_tile(num_keys, {weights_ + key, 1, padded}, grad_panels + p * count * kPanel,
                          count, true, value_sums + p * panel_size + key * kPanel);
          });
        }
        for (int64_t i = 0; i < count; ++i) {
          rotate_back(queries_ + i * in_.width, first + i, grad_queries.at(b_, first + i, head));
        }
      });
    }
    float* const row = queries_;
    for (int64_t t = 0; t < in_.length; ++t) {
      unpack(key_sums, t, row);
      rotate_back(row, t, grad_keys.at(b_, t, key_head_));
      unpack(value_sums, t, grad_values.at(b_, t, key_head_));
    }
  }

 private:
  void rotate_row(const float* from, int64_t t, float* to) const {
    const int64_t at = in_.angles.at(b_, t);
    rotate(from, in_.angles.cos + at, in_.angles.sin + at, in_.width, false, to);
  }
  void rotate_back(const float* from, int64_t t, float* to) const {
    const int64_t at = in_.angles.at(b_, t);
    rotate(from, in_.angles.cos + at, in_.angles.sin + at, in_.width, true, to);
  }

  // Row t of panels [T, 32].
  void unpack(const float* panels, int64_t t, float* to) const {
    for (int64_t column = 0; column < in_.width; column += kPanel) {
      std::copy_n(panels + column * in_.length + t * kPanel,
                  std::min<int64_t>(kPanel, in_.width - column), to + column);
    }
  }

  // to [count, padded T] = rows times panels of 32 keys or values each, up to `limit` of them.
  void multiply_panels(const LeftRows& rows, int64_t count, const float* panels, int64_t limit,
                       float* to) const {
    alignas(64) float tile[kTileRows * kPanel];
    for (int64_t p = 0; p * kPanel < limit; ++p) {
      multiply_tile(count, rows, panels + p * in_.width * kPanel, in_.width, false, tile);
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(tile + i * kPanel, kPanel, to + i * padded_length_ + p * kPanel);
      }
    }
  }

  // weights_ = products of some rotated queries of a head and the keys up to the last of them.
  void scores(int64_t head, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      rotate_row(in_.queries.at(b_, first + i, head), first + i, queries_ + i * in_.width);
    }
    multiply_panels({queries_, in_.width, 1}, count, keys_as_rows_, first + count, weights_);
  }

  const AttentionInputs& in_;
  int64_t width_panels_;
  int64_t padded_length_;
  int64_t b_;
  int64_t key_head_;
  Memory& memory_;
  float* keys_as_rows_;
  float* value_columns_;
  float* queries_;
  float* weights_;
};

// function(sequence, key head, memory), each pair a task.
template <typename Function>
void for_key_heads(const AttentionInputs& in, const Function& function) {
  const int64_t num_tasks = in.batch * in.num_key_heads;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    Workspace<Memory> memory;
    for (int64_t task = begin; task < end; ++task) {
      function(task / in.num_key_heads, task % in.num_key_heads, *memory);
    }
  });
}

// The tensors of a call, contiguous.
struct Call {
  Tensor query;
  Tensor key;
  Tensor value;
  Tensor cos;
  Tensor sin;

  Call(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const Tensor& cos_in,
       const Tensor& sin_in)
      : query(torch::stable::contiguous(query_in)),
        key(torch::stable::contiguous(key_in)),
        value(torch::stable::contiguous(value_in)),
        cos(torch::stable::contiguous(cos_in)),
        sin(torch::stable::contiguous(sin_in)) {}

  AttentionInputs inputs(double scale) const;
};

Heads<float> heads_of(Tensor& tensor, int64_t width) {
  return {tensor.mutable_data_ptr<float>(), tensor.size(1), width, tensor.size(2)};
}

Heads<const float> heads_of(const Tensor& tensor, int64_t width) {
  return {tensor.const_data_ptr<float>(), tensor.size(1), width, tensor.size(2)};
}

AttentionInputs Call::inputs(double scale) const {
  const int64_t width = cos.size(2);
  return {query.size(0),
          query.size(1),
          query.size(2) / width,
          key.size(2) / width,
          width,
          static_cast<float>(scale),
          heads_of(query, width),
          heads_of(key, width),
          heads_of(value, width),
          angles_of(cos, sin)};
}

std::tuple<Tensor, Tensor> rotary_attention(const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& cos,
                                            const Tensor& sin, double scale) {
  const Call call(query, key, value, cos, sin);
  const AttentionInputs in = call.inputs(scale);
  Tensor out = pooled_empty(call.query, {in.batch, in.length, query.size(2)});
  Tensor log_sums = torch::stable::new_empty(call.query, {in.batch, in.num_heads, in.length});
  attend(in, heads_of(out, in.width), log_sums.mutable_data_ptr<float>());
  return {out, log_sums};
}

// Gradients of query, key and value.
std::tuple<Tensor, Tensor, Tensor> rotary_attention_backward(
    const Tensor& grad_out_in, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& cos, const Tensor& sin, const Tensor& out_in, const Tensor& log_sums_in,
    double scale) {
  const Call call(query, key, value, cos, sin);
  const Tensor grad_out = torch::stable::contiguous(grad_out_in);
  const Tensor out = torch::stable::contiguous(out_in);
  const Tensor log_sums = torch::stable::contiguous(log_sums_in);
  const AttentionInputs in = call.inputs(scale);
  const auto fresh = [](const Tensor& like) {
    return pooled_empty(like, {like.size(0), like.size(1), like.size(2)});
  };
  Tensor grad_query = fresh(call.query);
  Tensor grad_key = fresh(call.key);
  Tensor grad_value = fresh(call.value);
  attend_backward(in, heads_of(grad_out, in.width), heads_of(out, in.width),
                  log_sums.const_data_ptr<float>(), heads_of(grad_query, in.width),
                  heads_of(grad_key, in.width), heads_of(grad_value, in.width));
  return {grad_query, grad_key, grad_value};
}

}  // namespace

void attend(const AttentionInputs& in, const Heads<float>& out, float* log_sums) {
  for_key_heads(in, [&](int64_t b, int64_t key_head, Memory& memory) {
    KeyHead(in, b, key_head, memory).forward(out, log_sums);
  });
}

void attend_backward(const AttentionInputs& in, const Heads<const float>& grad_out,
                     const Heads<const float>& out, const float* log_sums,
                     const Heads<float>& grad_queries, const Heads<float>& grad_keys,
                     const Heads<float>& grad_values) {
  for_key_heads(in, [&](int64_t b, int64_t key_head, Memory& memory) {
    KeyHead(in, b, key_head, memory)
        .backward(grad_out, out, log_sums, grad_queries, grad_keys, grad_values);
  });
}

}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("rotary_attention", TORCH_BOX(&calm::rotary_attention));
  m.impl("rotary_attention_backward", TORCH_BOX(&calm::rotary_attention_backward));
}
