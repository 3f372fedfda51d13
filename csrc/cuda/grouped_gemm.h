// Launchers of the grouped matrix products: plain pointers, no torch. Names of sizes as in the contract
// (kernels/parrot_kernels/grouped_gemm): G groups, J segments of V rows, S segments before a gather.
#pragma once

#include <stdint.h>

namespace parrot::cuda {

struct RaggedRows {
  const void* offsets;  // [G + 1], int32, or int64 when wide_offsets; null: each group takes all S segments, J = G * S
  const int64_t* plan;  // [J], or null: segments are read in place
  int32_t wide_offsets, topk;
  int32_t groups, segments, segment_rows, source_segments;  // G, J, V, S
};

// Segments with fewer rows would leave most of a box empty: their rows are gathered one by one.
constexpr int32_t kLeastRowsOfRun = 64;

// A reduction that is split where tiles would not fill the device: pairs of tiles from `whole` on are computed in
// `parts`.
struct SplitTail {
  int32_t whole = 0, parts = 1;
};

// Numbers that share a scale in float8: of a row, and of weights also rows.
constexpr int32_t kScaleBlock = 128;

// With scales x and w are float8 (e4m3) and `k` counts pairs of them, as numbers of 16 bits; y and z have 16 bits.
struct MGroupedGemm {
  RaggedRows rows;
  const void* x;          // [J, V, K] in place, or [S, V, K]
  const void* w;          // [G, N, K] when trans_w, else [G, K, N]; SwiGLU: [G, 2, N, K]
  const float* x_scales;  // [rows of x, blocks of K], or null
  const float* w_scales;  // [matrices, blocks of N, blocks of K], or null
  void* y;                // [J, V, N]
  void* z;                // SwiGLU: [J, V, 2, N] or null
  const float* weights;   // SwiGLU: [J] or null
  int32_t n, k;
  int32_t bfloat16, trans_w;
};

struct KGroupedGemm {
  RaggedRows rows;
  const void* a;  // [J, V, N]
  const void* b;  // [J, V, K] in place, or [S, V, K]
  void* c;        // [G, N, K]
  int32_t n, k;
  int32_t bfloat16;
};

// Each returns 0, a cudaError_t, or a CUresult of the tensor maps. Widths are multiples of 8, pointers of 16 bytes; no
// size is zero, except that k_grouped_gemm takes J = 0.
extern "C" int parrot_m_grouped_gemm(const MGroupedGemm* problem, void* stream);
extern "C" int parrot_m_grouped_swiglu(const MGroupedGemm* problem, void* stream);
extern "C" int parrot_k_grouped_gemm(const KGroupedGemm* problem, void* stream);

}  // namespace parrot::cuda
