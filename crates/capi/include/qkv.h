/*
 * qkv: attention on CPUs in one fused pass. A guide with a complete program: docs/C.md in the sources.
 *
 * Every function may be called with anything in its arguments: NULL, misaligned or destroyed pointers, negative or absurd
 * sizes, strides that overlap, outputs that lie in tensors that are read. It then answers with a qkv_status, writes
 * nothing, and qkv_last_error_message() tells what was wrong. What cannot be told from an address the caller vouches for:
 * that the memory behind a pointer that is not NULL is there, has the described extent (which descriptors can be given to
 * check), is initialised where it is read, and is not written by others during the call.
 *
 * Nothing passed in is kept or freed, except where a function says so. Handles (qkv_cache, ...) are numbers in the shape of
 * pointers: one that was destroyed is refused, also after others were made. All functions may be called from any thread;
 * calls that change one cache wait for each other.
 *
 * This file is made by cbindgen from the crate qkv-capi. Do not change it.
 */
#ifndef QKV_H
#define QKV_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// How a call ended. Where it is not QKV_OK, nothing has been written to the outputs (but see QKV_ERROR_INTERNAL), and
// qkv_last_error_message() says which argument was wrong, what came and what was expected.
enum qkv_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // Done.
    QKV_OK = 0,
    // A pointer is NULL that must not be.
    QKV_ERROR_NULL = 1,
    // An address is not a multiple of its type's size.
    QKV_ERROR_MISALIGNED = 2,
    // A number is not what it may be: a negative size, a NaN, an enumerator that there is not.
    QKV_ERROR_VALUE = 3,
    // struct_size of a versioned struct is too small, or absurd.
    QKV_ERROR_STRUCT_SIZE = 4,
    // Sizes do not fit each other, or a list has the wrong number of entries.
    QKV_ERROR_SHAPE = 5,
    // Strides that are not allowed: a head dim that is not contiguous, an output that overlaps itself.
    QKV_ERROR_STRIDES = 6,
    // A tensor leaves the buffer that its descriptor names.
    QKV_ERROR_OUT_OF_BOUNDS = 7,
    // Sizes and strides reach further than addresses do.
    QKV_ERROR_TOO_LARGE = 8,
    // A tensor of a type that this argument does not take.
    QKV_ERROR_DTYPE = 9,
    // An output shares memory with an input or another output.
    QKV_ERROR_OVERLAP = 10,
    // A handle that is not live: never made, destroyed already, or of another kind.
    QKV_ERROR_HANDLE = 11,
    // A sequence of a paged cache that is not live.
    QKV_ERROR_SEQUENCE = 12,
    // The new tokens do not fit the cache.
    QKV_ERROR_FULL = 13,
    // Memory cannot be had.
    QKV_ERROR_MEMORY = 14,
    // Options that do not go together, or that this version does not know.
    QKV_ERROR_NOT_SUPPORTED = 15,
    // QKV_ISA asks for an instruction set that cannot be used.
    QKV_ERROR_ISA = 16,
    // An error inside qkv: please report it. Outputs may have been written to.
    QKV_ERROR_INTERNAL = 17,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum qkv_status qkv_status;
#else
typedef int32_t qkv_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Attention of certain sizes, types and options, which have been looked at.
typedef struct qkv_attention_plan qkv_attention_plan;

// Keys and values of a batch of sequences, each of its own length.
typedef struct qkv_cache qkv_cache;

// A right-hand side packed ahead: weights that are multiplied many times.
typedef struct qkv_packed_matrix qkv_packed_matrix;

// Keys and values of any number of sequences in the pages of one pool.
typedef struct qkv_paged_cache qkv_paged_cache;

// Tables of cosines and sines, and which dims they turn.
typedef struct qkv_rotary qkv_rotary;

// A type of values: one of the QKV_DTYPE_ numbers.
typedef uint32_t qkv_dtype;

// A tensor that is read: (batch, heads, length, dim), or what else an argument says of its four axes.
//
// Element (b, h, s, d) lies at data + (b strides[0] + h strides[1] + s strides[2] + d strides[3]) values. Strides may
// have any sign, and 0 repeats one element along an axis; queries, keys, values and outputs need strides[3] = 1. A tensor
// with a size of 0 is empty, and its data may be NULL.
typedef struct qkv_tensor {
    // Where element (0, 0, 0, 0) lies, aligned to its type.
    const void *data;
    // Sizes.
    int64_t shape[4];
    // Values (not bytes) from one index to the next.
    int64_t strides[4];
    // If not NULL: the memory that all elements must lie in, which is checked then. If NULL, the caller vouches for it.
    const void *buffer;
    // Bytes of it.
    size_t buffer_size;
    // For QKV_DTYPE_I8: the scales, f32 (batch, heads, length, groups), the groups dividing the dim. Else NULL.
    const struct qkv_tensor *scales;
    // For QKV_DTYPE_I8, or NULL: zero points of the same shape; an integer q stands for scale (q - zero).
    const struct qkv_tensor *zeros;
    // The type of the values.
    qkv_dtype dtype;
    // 0.
    uint32_t reserved;
} qkv_tensor;

// A tensor that is written, as qkv_tensor says; no two elements may share their memory.
typedef struct qkv_tensor_mut {
    // Where element (0, 0, 0, 0) lies, aligned to its type.
    void *data;
    // Sizes.
    int64_t shape[4];
    // Values (not bytes) from one index to the next.
    int64_t strides[4];
    // If not NULL: the memory that all elements must lie in, which is checked then. If NULL, the caller vouches for it.
    const void *buffer;
    // Bytes of it.
    size_t buffer_size;
    // The type of the values: QKV_DTYPE_F32, QKV_DTYPE_F16 or QKV_DTYPE_BF16.
    qkv_dtype dtype;
    // 0.
    uint32_t reserved;
} qkv_tensor_mut;

// What qkv runs on.
typedef struct qkv_cpu_info {
    // sizeof(qkv_cpu_info), set before the call.
    size_t struct_size;
    // The instruction set in use: "portable", "avx2", "avx512", "neon" or "simd128". It is never freed.
    const char *isa;
    // CPUs that the process may use.
    size_t cores;
    // Bytes of the first-level data cache.
    size_t l1d;
    // Bytes of the second-level cache.
    size_t l2;
    // Bytes of the third-level cache; 0 where there is none.
    size_t l3;
} qkv_cpu_info;

// How inverse frequencies are changed for long sequences: one of the QKV_ROTARY_ numbers. Names and arithmetic are those
// of rope_parameters in a model's config.json.
typedef uint32_t qkv_rotary_scaling;

// What a rotary embedding is made from. 0 is the usual value of every field but head_dim.
typedef struct qkv_rotary_config {
    // sizeof(qkv_rotary_config).
    size_t struct_size;
    // Values of a row.
    int64_t head_dim;
    // How many of them are rotated, the first ones: even; 0 is all.
    int64_t rotary_dim;
    // Positions in the table; 0 is 2048.
    int64_t max_length;
    // For all scalings but linear: the model's original_max_position_embeddings.
    int64_t original_length;
    // For QKV_ROTARY_DYNAMIC: the length that the base is computed for; 0 is original_length.
    int64_t sequence_length;
    // theta; 0 is 10000.
    double base;
    // For all scalings.
    double factor;
    // For QKV_ROTARY_YARN; 0 is 32.
    double beta_fast;
    // For QKV_ROTARY_YARN; 0 is 1.
    double beta_slow;
    // For QKV_ROTARY_YARN: what cosines and sines are multiplied by; 0 is computed from factor and the two below.
    double attention_factor;
    // For QKV_ROTARY_YARN: DeepSeek's; 0 is none.
    double mscale;
    // For QKV_ROTARY_YARN: DeepSeek's; 0 is none.
    double mscale_all_dim;
    // For QKV_ROTARY_LLAMA3.
    double low_freq_factor;
    // For QKV_ROTARY_LLAMA3.
    double high_freq_factor;
    // 0: pairs are (i, i + rotary_dim / 2), as in Llama; 1: (0, 1), (2, 3), ..., as in GPT-J.
    uint32_t interleaved;
    // One of the QKV_ROTARY_ numbers.
    qkv_rotary_scaling scaling;
    // For QKV_ROTARY_YARN: 1 leaves the ramp's ends unrounded ("truncate": false).
    uint32_t no_truncate;
    // 0.
    uint32_t reserved;
} qkv_rotary_config;

// Numbers that are read. NULL and 0: not given.
typedef struct qkv_floats {
    // The first.
    const float *data;
    // How many.
    size_t count;
} qkv_floats;

// Lengths, ends or positions. NULL and 0: not given.
typedef struct qkv_integers {
    // The first.
    const int64_t *data;
    // How many.
    size_t count;
} qkv_integers;

// How queries are aligned with keys: one of the QKV_CAUSAL_ numbers.
typedef uint32_t qkv_causal;

// What is asked of attention beyond its tensors. In every field 0 means "not asked for", so all zeros with struct_size
// set, which qkv_attention_options_init() makes, is plain attention. Options combine freely.
//
// The score of query i and key j is s = softcap(scale q_i . k_j) + bias + ALiBi + T5, then the masks. A query's position p
// among the keys is i for QKV_CAUSAL_TOP_LEFT, i + causal_offset for QKV_CAUSAL_OFFSET, and else i + key length - query
// length. "Per sequence" means per batch, or per sequence of a packed or paged call.
typedef struct qkv_attention_options {
    // sizeof(qkv_attention_options).
    size_t struct_size;
    // QKV_DTYPE_BOOL, 1 = takes part. Each size is that of (batch, query heads, query length, key length), or 1.
    const struct qkv_tensor *mask;
    // f32, f16 or bf16, added to the scores; sizes as of mask; -infinity masks.
    const struct qkv_tensor *bias;
    // -slope |p - j| is added: (query heads), or (sequences, query heads).
    struct qkv_floats alibi_slopes;
    // One logit per query head: joins the maximum and the sum, has no value.
    struct qkv_floats sinks;
    // Per sequence: keys from here on are not there.
    struct qkv_integers key_lengths;
    // Per sequence: keys below are not there (left padding). Positions are not shifted.
    struct qkv_integers key_starts;
    // Per sequence: keys below are seen by every query, whatever causal says (prefix-LM).
    struct qkv_integers prefix;
    // Packed documents by their ends, in key positions, ascending, the last the key length: a query sees the keys of the
    // document that its position is in.
    struct qkv_integers documents;
    // For QKV_CAUSAL_OFFSET.
    int64_t causal_offset;
    // Where has_window is 1, the query sees keys p - window_left to p + window_right; -1 is unbounded.
    int64_t window_left;
    // See window_left.
    int64_t window_right;
    // Of the window, every n-th key counted from p; 0 is 1.
    int64_t window_dilation;
    // T5's bucketed bias: (buckets, query heads), row-major.
    struct qkv_floats t5_table;
    // Even, at least 2 (bidirectional: 4).
    int64_t t5_buckets;
    // Distances from here on share the last bucket.
    int64_t t5_max_distance;
    // QKV_DTYPE_BOOL (batch or 1, heads or 1, query blocks, key blocks): blocks of block_mask_queries x block_mask_keys
    // that are seen.
    const struct qkv_tensor *block_mask;
    // Queries of a block.
    int64_t block_mask_queries;
    // Keys of a block.
    int64_t block_mask_keys;
    // Queries are rotated when they are loaded.
    const struct qkv_rotary *rotary;
    // To these positions: one per query of a sequence, the same for all batches, or (batch, query length).
    struct qkv_integers rotary_positions;
    // The factor of q . k, where has_scale is 1; else it is 1 / sqrt(key dim).
    float scale;
    // Scores become softcap tanh(score / softcap); 0 does not.
    float softcap;
    // 0 or 1: whether scale is given.
    uint32_t has_scale;
    // 0 or 1: whether window_left and window_right are given.
    uint32_t has_window;
    // The causal mask.
    qkv_causal causal;
    // 0 or 1: whether keys after the query have buckets of their own in t5_table.
    uint32_t t5_bidirectional;
} qkv_attention_options;

// Numbers that are written. NULL and 0: not given.
typedef struct qkv_floats_mut {
    // The first.
    float *data;
    // How many.
    size_t count;
} qkv_floats_mut;

// Where results go.
typedef struct qkv_attention_outputs {
    // sizeof(qkv_attention_outputs).
    size_t struct_size;
    // (batch, query heads, query length, value dim), any strides, f32, f16 or bf16.
    struct qkv_tensor_mut output;
    // If given: the natural log of the sum of exponentials of each query's visible scores and its sink, contiguous (batch,
    // query heads, query length); -infinity for a query that sees no key and has no sink.
    struct qkv_floats_mut lse;
    // If given: the largest of them, in the same shape; any number for a query that has a score of NaN.
    struct qkv_floats_mut maxima;
} qkv_attention_outputs;

// Keys and values in pages of the caller's own pool.
typedef struct qkv_pages {
    // (pages, key/value heads, page size, key dim), any strides on the first three.
    const struct qkv_tensor *keys;
    // (pages, key/value heads, page size, value dim).
    const struct qkv_tensor *values;
    // The pages of each sequence, in order: row i of (sequences, tables_stride). Only those that a length needs are read.
    const uint32_t *tables;
    // Entries from one row of tables to the next.
    size_t tables_stride;
    // Keys of each sequence.
    struct qkv_integers lengths;
} qkv_pages;

// One side of a merge: an output (batch, heads, length, dim) of f32 and its LSE, contiguous (batch, heads, length).
typedef struct qkv_part {
    // The output.
    const struct qkv_tensor *output;
    // Its log-sum-exp.
    struct qkv_floats lse;
} qkv_part;

// What a cache is to be like.
typedef struct qkv_cache_config {
    // sizeof(qkv_cache_config).
    size_t struct_size;
    // Sequences.
    int64_t batch;
    // Key/value heads.
    int64_t kv_heads;
    // The most tokens of a sequence.
    int64_t capacity;
    // Dim of a key.
    int64_t key_dim;
    // Dim of a value.
    int64_t value_dim;
    // Not 0: rolling. When new tokens do not fit, all but the last window of a sequence are dropped; at most half the
    // capacity. More than capacity - window tokens in one append are refused.
    int64_t window;
    // For QKV_DTYPE_I8: dims that share a scale, a divisor of both dims; 0 is one scale per token and head.
    int64_t group;
    // How keys and values are stored: f32, f16, bf16 or int8.
    qkv_dtype dtype;
    // For QKV_DTYPE_I8, 0 or 1: whether the range of a group may lie anywhere, instead of around 0.
    uint32_t zero_point;
} qkv_cache_config;

// What a paged cache is to be like.
typedef struct qkv_paged_cache_config {
    // sizeof(qkv_paged_cache_config).
    size_t struct_size;
    // Pages of the pool.
    int64_t pages;
    // Tokens of a page.
    int64_t page_size;
    // Key/value heads.
    int64_t kv_heads;
    // Dim of a key.
    int64_t key_dim;
    // Dim of a value.
    int64_t value_dim;
    // For QKV_DTYPE_I8: dims that share a scale, a divisor of both dims; 0 is one scale per token and head.
    int64_t group;
    // How keys and values are stored: f32, f16, bf16 or int8.
    qkv_dtype dtype;
    // For QKV_DTYPE_I8, 0 or 1: whether the range of a group may lie anywhere, instead of around 0.
    uint32_t zero_point;
} qkv_paged_cache_config;

// A sequence of a paged cache: a number that is not 0 and never used again.
typedef uint64_t qkv_sequence;

// A function of every result of a product: one of the QKV_ACTIVATION_ numbers.
typedef uint32_t qkv_activation;

// What is computed beside A B. All zeros with struct_size set, which qkv_gemm_options_init() makes, is C = A B.
typedef struct qkv_gemm_options {
    // sizeof(qkv_gemm_options).
    size_t struct_size;
    // If given: one value per column, added before the activation.
    struct qkv_floats bias;
    // Factor of the product, where has_alpha is 1; else it is 1.
    float alpha;
    // Factor of what is in C; with 0 it is not read.
    float beta;
    // 0 or 1: whether alpha is given.
    uint32_t has_alpha;
    // A function of every result.
    qkv_activation activation;
} qkv_gemm_options;

// 32-bit floats.
#define QKV_DTYPE_F32 0

// IEEE binary16.
#define QKV_DTYPE_F16 1

// bfloat16: the upper half of a 32-bit float.
#define QKV_DTYPE_BF16 2

// 8-bit integers with scales: keys and values only.
#define QKV_DTYPE_I8 3

// One byte each, 0 or 1: masks only.
#define QKV_DTYPE_BOOL 4

// No causal mask.
#define QKV_CAUSAL_NONE 0

// Query i sees key j where j <= i.
#define QKV_CAUSAL_TOP_LEFT 1

// Query i sees key j where j <= i + key length - query length.
#define QKV_CAUSAL_BOTTOM_RIGHT 2

// Query i sees key j where j <= i + causal_offset.
#define QKV_CAUSAL_OFFSET 3

// None.
#define QKV_ACTIVATION_NONE 0

// x Phi(x), Phi being the normal distribution's.
#define QKV_ACTIVATION_GELU 1

// Its approximation by tanh.
#define QKV_ACTIVATION_GELU_TANH 2

// max(x, 0).
#define QKV_ACTIVATION_RELU 3

// x / (1 + exp(-x)).
#define QKV_ACTIVATION_SILU 4

// As in the paper.
#define QKV_ROTARY_DEFAULT 0

// Positions divided by factor.
#define QKV_ROTARY_LINEAR 1

// A base that grows with sequence_length.
#define QKV_ROTARY_DYNAMIC 2

// YaRN: low frequencies divided by factor, high ones kept, a ramp between.
#define QKV_ROTARY_YARN 3

// Llama 3.1: long wavelengths stretched by factor, short ones kept, the middle blended.
#define QKV_ROTARY_LLAMA3 4

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// (batch, heads, length, dim), row-major without gaps.
struct qkv_tensor qkv_tensor_bhsd(const void *data,
                                  qkv_dtype dtype,
                                  int64_t batch,
                                  int64_t heads,
                                  int64_t length,
                                  int64_t dim);

// (batch, length, heads, dim) in memory, row-major without gaps. The sizes are given, and kept, as (batch, heads, length,
// dim).
struct qkv_tensor qkv_tensor_bshd(const void *data,
                                  qkv_dtype dtype,
                                  int64_t batch,
                                  int64_t heads,
                                  int64_t length,
                                  int64_t dim);

// As qkv_tensor_bhsd, to be written.
struct qkv_tensor_mut qkv_tensor_mut_bhsd(void *data,
                                          qkv_dtype dtype,
                                          int64_t batch,
                                          int64_t heads,
                                          int64_t length,
                                          int64_t dim);

// As qkv_tensor_bshd, to be written.
struct qkv_tensor_mut qkv_tensor_mut_bshd(void *data,
                                          qkv_dtype dtype,
                                          int64_t batch,
                                          int64_t heads,
                                          int64_t length,
                                          int64_t dim);

// A matrix of f32, row-major without gaps: sizes (1, 1, rows, columns).
struct qkv_tensor qkv_matrix(const float *data, int64_t rows, int64_t columns);

// As qkv_matrix, to be written.
struct qkv_tensor_mut qkv_matrix_mut(float *data, int64_t rows, int64_t columns);

// The transpose of a matrix, or of each matrix of a batch: the last two axes swapped.
struct qkv_tensor qkv_transposed(struct qkv_tensor matrix);

// What was wrong with the last call of this thread that failed: the argument, what came and what was expected. An empty
// string where none has failed. It is valid until the next call of this thread fails.
const char *qkv_last_error_message(void);

// The name of a status, such as "QKV_ERROR_SHAPE"; "unknown" where there is none of this number.
const char *qkv_status_name(int32_t status);

// Sets the number of threads that compute, for all calls that begin afterwards; 1 or more.
//
// Without it there are RAYON_NUM_THREADS, or as many as the machine runs at once. Results do not depend on it. It costs
// least before the first call that computes: later, work is handed to a new pool of threads.
qkv_status qkv_set_num_threads(size_t threads);

// The number of threads that compute; 0 where they cannot be started.
size_t qkv_num_threads(void);

// The version of the library, such as "0.1.0".
const char *qkv_version(void);

// Tells what qkv runs on. QKV_ERROR_ISA where the environment variable QKV_ISA asks for what cannot be used.
qkv_status qkv_cpu_info_get(struct qkv_cpu_info *info);

// Makes a rotary embedding.
qkv_status qkv_rotary_create(const struct qkv_rotary_config *config, struct qkv_rotary **rotary);

// Makes a rotary embedding of tables (positions, rotary_dim / 2), row-major, which are copied; interleaved as in
// qkv_rotary_config.
qkv_status qkv_rotary_from_tables(struct qkv_floats cosines,
                                  struct qkv_floats sines,
                                  int64_t rotary_dim,
                                  int64_t head_dim,
                                  uint32_t interleaved,
                                  struct qkv_rotary **rotary);

// Ends a rotary embedding; NULL does nothing.
qkv_status qkv_rotary_destroy(struct qkv_rotary *rotary);

// Rotates rows (batch, heads, length, head dim) of f32 in place: a token's, in every head, to the token's position.
// positions are one per token for the whole batch, or batch x length.
qkv_status qkv_rotary_apply(const struct qkv_rotary *rotary,
                            const struct qkv_tensor_mut *rows,
                            struct qkv_integers positions);

// Attention: output = softmax(scale query key^T + masks) value.
//
// query is (batch, query heads, query length, key dim), key (batch, key/value heads, key length, key dim), value (batch,
// key/value heads, key length, value dim), output (batch, query heads, query length, value dim). Query head h reads
// key/value head h / (query heads / key/value heads). A query that sees no key gives 0. options may be NULL.
//
// A decode step is the same call with few queries: keys are then read in parts, by all threads.
qkv_status qkv_attention(const struct qkv_tensor *query,
                         const struct qkv_tensor *key,
                         const struct qkv_tensor *value,
                         const struct qkv_attention_options *options,
                         const struct qkv_attention_outputs *outputs);

// Attention of sequences packed one after the other along the length of batch 1: (1, heads, total length, dim).
//
// Sequence i is rows query_ends[i] to query_ends[i + 1] of query and output, and rows key_ends[i] to key_ends[i + 1] of
// key and value; both lists ascend from 0 to the total length (cu_seqlens). Alignments, windows and biases count within a
// sequence. Options that are indexed by query or key of the whole call (mask, bias, block_mask, key_lengths, documents)
// have no meaning here and are refused.
qkv_status qkv_attention_packed(const struct qkv_tensor *query,
                                const struct qkv_tensor *key,
                                const struct qkv_tensor *value,
                                struct qkv_integers query_ends,
                                struct qkv_integers key_ends,
                                const struct qkv_attention_options *options,
                                const struct qkv_attention_outputs *outputs);

// Attention of packed queries over keys and values in pages: prefill chunks and decode steps in one call.
//
// query is (1, query heads, total length, key dim): sequence i has rows query_ends[i] to query_ends[i + 1] of it and of
// the output, and the first pages->lengths[i] keys of its pages. Options as for qkv_attention_packed.
qkv_status qkv_attention_paged(const struct qkv_tensor *query,
                               struct qkv_integers query_ends,
                               const struct qkv_pages *pages,
                               const struct qkv_attention_options *options,
                               const struct qkv_attention_outputs *outputs);

// Merges attention over two disjoint sets of keys into attention over both: split keys, shared prefixes, parts of a
// sequence on other machines.
//
// A side that saw no key (LSE -infinity) has no weight. A sink may be counted in one of the sides only. outputs->lse may be
// left out; outputs->maxima must be.
qkv_status qkv_merge(const struct qkv_part *a,
                     const struct qkv_part *b,
                     const struct qkv_attention_outputs *outputs);

// Makes a plan for attention of these sizes and types, and looks at all that can be wrong with them and the options.
//
// Of query, key and value sizes and types count, and may come with data NULL. Lists of the options are copied; the data of
// mask and bias is not, and must stay where it is until the plan is destroyed, but may change between calls.
qkv_status qkv_attention_plan_create(const struct qkv_tensor *query,
                                     const struct qkv_tensor *key,
                                     const struct qkv_tensor *value,
                                     const struct qkv_attention_options *options,
                                     struct qkv_attention_plan **plan);

// Ends a plan; NULL does nothing.
qkv_status qkv_attention_plan_destroy(struct qkv_attention_plan *plan);

// Attention as planned, of tensors with the plan's sizes and types and any strides. Threads may share a plan.
qkv_status qkv_attention_plan_run(const struct qkv_attention_plan *plan,
                                  const struct qkv_tensor *query,
                                  const struct qkv_tensor *key,
                                  const struct qkv_tensor *value,
                                  const struct qkv_attention_outputs *outputs);

// How the plan is carried out, in words: the kernel, block sizes, tasks, scratch, and how much of the score matrix is
// computed. NULL where the plan is not live or too large to count. The text lives as long as the plan.
const char *qkv_attention_plan_explain(const struct qkv_attention_plan *plan);

// Makes an empty cache, with all its memory.
qkv_status qkv_cache_create(const struct qkv_cache_config *config, struct qkv_cache **cache);

// Ends a cache; NULL does nothing. Calls that use it finish first.
qkv_status qkv_cache_destroy(struct qkv_cache *cache);

// Adds tokens to every sequence: key and value (batch, heads, new tokens, dim) in f32, f16 or bf16. Where rotary is not
// NULL, keys are rotated to their positions. A refused call leaves the cache as it was.
qkv_status qkv_cache_append(struct qkv_cache *cache,
                            const struct qkv_tensor *key,
                            const struct qkv_tensor *value,
                            const struct qkv_rotary *rotary);

// Adds tokens to one sequence: key and value (1, heads, new tokens, dim); else as qkv_cache_append.
qkv_status qkv_cache_append_to(struct qkv_cache *cache,
                               int64_t batch,
                               const struct qkv_tensor *key,
                               const struct qkv_tensor *value,
                               const struct qkv_rotary *rotary);

// Forgets the tokens of a sequence from length on, as when drafted tokens are rejected.
qkv_status qkv_cache_truncate(struct qkv_cache *cache, int64_t batch, int64_t length);

// Empties one sequence, whose positions begin at 0 again.
qkv_status qkv_cache_clear(struct qkv_cache *cache, int64_t batch);

// Tokens that a sequence holds; -1 where cache or batch are not there.
int64_t qkv_cache_length(const struct qkv_cache *cache, int64_t batch);

// Tokens that rolling has dropped in front of a sequence; -1 where cache or batch are not there.
int64_t qkv_cache_dropped(const struct qkv_cache *cache, int64_t batch);

// Bytes of keys and values, used or not; 0 where the cache is not there.
size_t qkv_cache_bytes(const struct qkv_cache *cache);

// Attention of query (batch, query heads, query length, key dim) over what the cache holds.
//
// Key lengths are the cache's own, and options->key_lengths is refused; options may be NULL. With more than one query per
// sequence, QKV_CAUSAL_BOTTOM_RIGHT is the usual alignment. Calls that only read a cache run side by side.
qkv_status qkv_cache_attention(const struct qkv_cache *cache,
                               const struct qkv_tensor *query,
                               const struct qkv_attention_options *options,
                               const struct qkv_attention_outputs *outputs);

// A step of decoding: adds key and value to every sequence, as qkv_cache_append, and then is qkv_cache_attention.
//
// With options->rotary the new keys are rotated too, and the queries, where rotary_positions are not given, to the
// positions of the new tokens; then there must be as many queries as tokens. Where attention is refused, the new tokens are
// forgotten again (what rolling has dropped stays dropped).
qkv_status qkv_decode(struct qkv_cache *cache,
                      const struct qkv_tensor *query,
                      const struct qkv_tensor *key,
                      const struct qkv_tensor *value,
                      const struct qkv_attention_options *options,
                      const struct qkv_attention_outputs *outputs);

// Makes a pool of free pages, with all its memory.
qkv_status qkv_paged_cache_create(const struct qkv_paged_cache_config *config, struct qkv_paged_cache **cache);

// Ends a cache with all its sequences; NULL does nothing. Calls that use it finish first.
qkv_status qkv_paged_cache_destroy(struct qkv_paged_cache *cache);

// A new, empty sequence; 0 where the cache is not there.
qkv_sequence qkv_paged_cache_sequence(struct qkv_paged_cache *cache);

// A new sequence that holds the same tokens and shares their pages; 0 where cache or sequence are not there.
qkv_sequence qkv_paged_cache_fork(struct qkv_paged_cache *cache, qkv_sequence sequence);

// Ends a sequence. Pages that no other holds are free then.
qkv_status qkv_paged_cache_free(struct qkv_paged_cache *cache, qkv_sequence sequence);

// Adds tokens to a sequence: key and value (1, heads, new tokens, dim) in f32, f16 or bf16. Where rotary is not NULL, keys
// are rotated to their positions. A refused call leaves the cache as it was.
qkv_status qkv_paged_cache_append(struct qkv_paged_cache *cache,
                                  qkv_sequence sequence,
                                  const struct qkv_tensor *key,
                                  const struct qkv_tensor *value,
                                  const struct qkv_rotary *rotary);

// Forgets the tokens of a sequence from length on, and lets go of pages that it needs no more.
qkv_status qkv_paged_cache_truncate(struct qkv_paged_cache *cache, qkv_sequence sequence, int64_t length);

// Tokens of a sequence; -1 where cache or sequence are not there.
int64_t qkv_paged_cache_length(const struct qkv_paged_cache *cache, qkv_sequence sequence);

// Pages of the pool, used or not; -1 where the cache is not there.
int64_t qkv_paged_cache_pages(const struct qkv_paged_cache *cache);

// Pages that no sequence holds; -1 where the cache is not there.
int64_t qkv_paged_cache_free_pages(const struct qkv_paged_cache *cache);

// Bytes of all pages, used or not; 0 where the cache is not there.
size_t qkv_paged_cache_bytes(const struct qkv_paged_cache *cache);

// Attention of packed queries over sequences of the cache: prefill chunks and decode steps in one call.
//
// query is (1, query heads, total length, key dim): sequences[i] has rows query_ends[i] to query_ends[i + 1] of it and of
// the output, so there is one end more than sequences; a sequence may come more than once. Options as for
// qkv_attention_packed; QKV_CAUSAL_BOTTOM_RIGHT is the usual alignment.
qkv_status qkv_paged_cache_attention(const struct qkv_paged_cache *cache,
                                     const qkv_sequence *sequences,
                                     const struct qkv_tensor *query,
                                     struct qkv_integers query_ends,
                                     const struct qkv_attention_options *options,
                                     const struct qkv_attention_outputs *outputs);

// A step of decoding, one token for each of several sequences: adds key and value (sequences, heads, 1, dim), token i to
// sequences[i], and then attends with query (sequences, query heads, 1, key dim), each over its own sequence.
//
// The list has as many entries as the query's batch, none twice. With options->rotary the new keys are rotated too, and the
// queries, where rotary_positions are not given, to the same positions. A refused call leaves the sequences as they were.
qkv_status qkv_paged_decode(struct qkv_paged_cache *cache,
                            const qkv_sequence *sequences,
                            const struct qkv_tensor *query,
                            const struct qkv_tensor *key,
                            const struct qkv_tensor *value,
                            const struct qkv_attention_options *options,
                            const struct qkv_attention_outputs *outputs);

// C = activation(alpha A B + beta C + bias), for every matrix of a batch; all of f32, any strides on all axes.
//
// Axes 2 and 3 are rows and columns: a is (.., m, k), b (.., k, n), c (.., m, n). Axes 0 and 1 count the batch: those of a
// and b are those of c, or 1, which repeats. options may be NULL.
qkv_status qkv_gemm(const struct qkv_tensor *a,
                    const struct qkv_tensor *b,
                    const struct qkv_tensor_mut *c,
                    const struct qkv_gemm_options *options);

// Packs b, one matrix (1, 1, k, n) of f32, for many products with it. Its values are copied.
qkv_status qkv_packed_matrix_create(const struct qkv_tensor *b, struct qkv_packed_matrix **packed);

// Ends a packed matrix; NULL does nothing.
qkv_status qkv_packed_matrix_destroy(struct qkv_packed_matrix *packed);

// As qkv_gemm for one matrix a (1, 1, m, k) and c (1, 1, m, n), with B packed ahead.
qkv_status qkv_gemm_packed(const struct qkv_tensor *a,
                           const struct qkv_packed_matrix *packed,
                           const struct qkv_tensor_mut *c,
                           const struct qkv_gemm_options *options);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

/* Structs that grow begin with their size. These make one in which nothing is asked for. */

static inline qkv_attention_options qkv_attention_options_init(void) {
    qkv_attention_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    return options;
}

static inline qkv_attention_outputs qkv_attention_outputs_init(qkv_tensor_mut output) {
    qkv_attention_outputs outputs;
    memset(&outputs, 0, sizeof outputs);
    outputs.struct_size = sizeof outputs;
    outputs.output = output;
    return outputs;
}

static inline qkv_gemm_options qkv_gemm_options_init(void) {
    qkv_gemm_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    return options;
}

static inline qkv_cache_config qkv_cache_config_init(void) {
    qkv_cache_config config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    return config;
}

static inline qkv_paged_cache_config qkv_paged_cache_config_init(void) {
    qkv_paged_cache_config config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    return config;
}

static inline qkv_rotary_config qkv_rotary_config_init(void) {
    qkv_rotary_config config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    return config;
}

static inline qkv_cpu_info qkv_cpu_info_init(void) {
    qkv_cpu_info info;
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    return info;
}

#endif /* QKV_H */
