// Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235) as torch.optim.Adafactor has
// it: how a step is laid out, and what one element does. Used by csrc/cpu and csrc/cuda.
#pragma once

#include "fastft/optimizer.h"

namespace fastft {

// A row of the table of a step: int64, in this order. The last two dimensions of a tensor are a
// matrix; a vector is a matrix of one row, whose second moments are the column alone.
struct FactoredTensor {
  StepTensor step;                 // without states
  int64_t row, column;             // float32 (batch, rows) and (batch, cols); row 0: a vector's
  int64_t batch, rows, cols;       // matrices, and their shape
  int64_t tile_rows, tile_cols;    // tile_cols: cols, or a multiple of kStateBlock
  int64_t first_tile, first_line;  // items of the tensors before this one
  int64_t row_sums, column_sums;   // where its sums of squares begin in the scratch
  int64_t row_means;               // and its sums of new row moments
};
constexpr int64_t kFactoredColumns = kStepColumns + 12;
// Rows or columns of one item of the pass over the moments.
constexpr int64_t kLines = 1024;

// One step. Everything is float32 but the tables, and lies where the kernels run.
struct FactoredCall {
  const FactoredTensor* tensors;
  int64_t count;
  const int32_t* tile_tensor;  // of each tile its tensor
  int64_t tiles;
  const int32_t* line_tensor;  // of each item of kLines rows or columns
  int64_t lines;
  float* scratch;      // see FactoredTensor
  float* partials;     // (3, tiles): squares of gradients, parameters and updates; then (count,)
  const float* hyper;  // (count, kHyperColumns): FactoredHyper
  float* stats;        // see fastft/ops/optimizer_step.py
  float max_norm;      // 0 for no clipping
  int needs_norm;      // 0: gradients are not looked at for a norm
  uint64_t seed;
};

inline namespace FASTFT_ISA {

FASTFT_HD int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Rows row0 to row1 and columns col0 to col1 of a matrix.
struct FactoredTile {
  int64_t matrix, row_tile, row0, row1, col0, col1;
};

FASTFT_HD FactoredTile tile_of(const FactoredTensor& t, int64_t tile) {
  const int64_t across = parts_of(t.cols, t.tile_cols), down = parts_of(t.rows, t.tile_rows);
  const int64_t own = tile - t.first_tile, left = own / across;
  FactoredTile f{};
  f.matrix = left / down, f.row_tile = left % down;
  f.row0 = f.row_tile * t.tile_rows, f.col0 = own % across * t.tile_cols;
  f.row1 = f.row0 + t.tile_rows < t.rows ? f.row0 + t.tile_rows : t.rows;
  f.col1 = f.col0 + t.tile_cols < t.cols ? f.col0 + t.tile_cols : t.cols;
  return f;
}

// Sums of squares of a row are kept for each kStateBlock columns.
FASTFT_HD int64_t row_sum_at(const FactoredTensor& t, int64_t matrix, int64_t segment) {
  return t.row_sums + (matrix * parts_of(t.cols, kStateBlock) + segment) * t.rows;
}
// Those of a column for each tile's rows.
FASTFT_HD int64_t column_sum_at(const FactoredTensor& t, int64_t matrix, int64_t row_tile) {
  return t.column_sums + (matrix * parts_of(t.rows, t.tile_rows) + row_tile) * t.cols;
}

// Lines first to end of the rows or of the columns of a matrix.
struct FactoredLines {
  int64_t matrix, item, first, end;
  bool is_row;
};

FASTFT_HD FactoredLines lines_of(const FactoredTensor& t, int64_t line) {
  const int64_t above = t.row ? parts_of(t.rows, kLines) : 0;
  const int64_t each = above + parts_of(t.cols, kLines), own = line - t.first_line;
  FactoredLines f{};
  f.matrix = own / each, f.item = own % each;
  f.is_row = f.item < above;
  const int64_t size = f.is_row ? t.rows : t.cols;
  f.first = (f.is_row ? f.item : f.item - above) * kLines;
  f.end = f.first + kLines < size ? f.first + kLines : size;
  return f;
}

// Row of the hyper-parameter table. eps1 below 0: that of the parameter's dtype.
struct FactoredHyper {
  float lr, weight_decay, threshold, eps1, eps2, decay, sign;
};

FASTFT_HD float first_eps(const FactoredHyper& h, DType dtype) {
  if (h.eps1 >= 0.0f) return h.eps1;
  return dtype == DType::kFloat32 ? 0x1p-23f : (dtype == DType::kBFloat16 ? 0x1p-7f : 0x1p-10f);
}

// The least variance: eps1 squared, which must not vanish.
FASTFT_HD float least_variance(float eps1) {
  const float square = eps1 * eps1;
  return square > 1.17549435e-38f ? square : 1.17549435e-38f;
}

// 1 - beta2 at this step, counted from 1.
FASTFT_HD float factored_rate(const FactoredHyper& h, float step) {
  return static_cast<float>(step_pow(static_cast<double>(step), static_cast<double>(h.decay)));
}

// Between old (rate 0) and fresh (rate 1), exact at both.
FASTFT_HD float blend(float old, float fresh, float rate) {
  const float way = fresh - old;
  return rate < 0.5f ? old + rate * way : fresh - way * (1.0f - rate);
}

// The mean of the rows' moments of a matrix, from the sums of their pass; 0 of a vector.
FASTFT_HD float mean_of_rows(const FactoredCall& call, const FactoredTensor& t, int64_t matrix) {
  if (!t.row) return 0.0f;
  const int64_t parts = parts_of(t.rows, kLines);
  const float* sums = call.scratch + t.row_means + matrix * parts;
  double sum = 0.0;
  for (int64_t i = 0; i < parts; ++i) sum += static_cast<double>(sums[i]);
  return static_cast<float>(sum / static_cast<double>(t.rows));
}

// What a row brings to the variance of its elements: R / mean R, 1 in a vector.
FASTFT_HD float row_share(float moment, float mean, float eps1) {
  return moment / (mean < eps1 ? eps1 : mean);
}

FASTFT_HD float inverse_root(float value) { return step_quotient(1.0f, step_sqrt(value)); }

// g / sqrt(max(variance, least)): the variance is a row's share times a column's moment, of which
// these are the inverse roots; most: that of the least. No root and no quotient an element.
FASTFT_HD float factored_update(float g, float row, float column, float most) {
  const float size = row * column;
  return g * (size > most ? most : size);  // NaN stays
}

// What an update is multiplied by: max(eps2, rms p) min(lr, 1 / sqrt t) / max(1, rms u / d).
FASTFT_HD float factored_size(const FactoredHyper& h, double p_squares, double u_squares,
                              int64_t numel, float step) {
  const double n = static_cast<double>(numel > 0 ? numel : 1);
#if defined(__CUDA_ARCH__)
  const double p = sqrt(p_squares / n), u = sqrt(u_squares / n);
  const double most = 1.0 / sqrt(static_cast<double>(step));
#else
  const double p = __builtin_sqrt(p_squares / n), u = __builtin_sqrt(u_squares / n);
  const double most = 1.0 / __builtin_sqrt(static_cast<double>(step));
#endif
  const double clip = u / h.threshold, lr = h.lr < most ? h.lr : most;
  return static_cast<float>((p < h.eps2 ? h.eps2 : p) * lr / (clip < 1.0 ? 1.0 : clip));
}

}  // namespace FASTFT_ISA
}  // namespace fastft
