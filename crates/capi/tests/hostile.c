/*
 * What C can pass in: every wrong argument is refused with its code and a message that names it, and nothing is written.
 * Prints a line for each failure and a closing line; exits with 1 where there was one.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <qkv.h>

static int passed, failed;

/* A call must end with this status, and its message begin with this text. */
static void expect(int line, qkv_status got, qkv_status want, const char *text) {
    const char *message = got == QKV_OK ? "" : qkv_last_error_message();
    if (got == want && strncmp(message, text, strlen(text)) == 0) {
        passed++;
        return;
    }
    failed++;
    printf("hostile.c:%d: got %s \"%s\", expected %s \"%s...\"\n", line, qkv_status_name(got), message,
           qkv_status_name(want), text);
}
#define EXPECT(call, status, text) expect(__LINE__, call, status, text)

static void expect_true(int line, int condition, const char *text) {
    if (condition) {
        passed++;
        return;
    }
    failed++;
    printf("hostile.c:%d: not so: %s (%s)\n", line, text, qkv_last_error_message());
}
#define TRUE(condition) expect_true(__LINE__, condition, #condition)

enum { B = 2, H = 4, KV = 2, S = 5, T = 7, D = 8 };
static float q[B * H * S * D], k[B * KV * T * D], v[B * KV * T * D], out[B * H * S * D], lse[B * H * S];
static const float untouched = 7.0f;

/* A call of attention whose parts can be spoilt one by one. */
typedef struct call {
    qkv_tensor query, key, value;
    qkv_attention_options options;
    qkv_attention_outputs outputs;
} call;

static call good(void) {
    call c;
    c.query = qkv_tensor_bhsd(q, QKV_DTYPE_F32, B, H, S, D);
    c.key = qkv_tensor_bhsd(k, QKV_DTYPE_F32, B, KV, T, D);
    c.value = qkv_tensor_bhsd(v, QKV_DTYPE_F32, B, KV, T, D);
    c.options = qkv_attention_options_init();
    c.outputs = qkv_attention_outputs_init(qkv_tensor_mut_bhsd(out, QKV_DTYPE_F32, B, H, S, D));
    return c;
}

static qkv_status run(const call *c) {
    return qkv_attention(&c->query, &c->key, &c->value, &c->options, &c->outputs);
}

/* Spoils a good call by a statement on c, and expects the refusal. */
#define SPOILT(change, status, text)     \
    do {                                 \
        call c = good();                 \
        change;                          \
        EXPECT(run(&c), status, text);   \
    } while (0)

static void tensors(void) {
    call c = good();
    EXPECT(run(&c), QKV_OK, "");
    for (size_t i = 0; i < B * H * S * D; i++) out[i] = untouched;

    EXPECT(qkv_attention(NULL, &c.key, &c.value, NULL, &c.outputs), QKV_ERROR_NULL, "query: NULL");
    EXPECT(qkv_attention(&c.query, NULL, &c.value, NULL, &c.outputs), QKV_ERROR_NULL, "key: NULL");
    EXPECT(qkv_attention(&c.query, &c.key, NULL, NULL, &c.outputs), QKV_ERROR_NULL, "value: NULL");
    EXPECT(qkv_attention(&c.query, &c.key, &c.value, NULL, NULL), QKV_ERROR_NULL, "outputs: NULL");
    EXPECT(qkv_attention((const qkv_tensor *)((const char *)&c.query + 1), &c.key, &c.value, NULL, &c.outputs),
           QKV_ERROR_MISALIGNED, "query: at ");

    SPOILT(c.query.data = NULL, QKV_ERROR_NULL, "query: data is NULL");
    SPOILT(c.outputs.output.data = NULL, QKV_ERROR_NULL, "output: data is NULL");
    SPOILT(c.key.data = (const char *)k + 2, QKV_ERROR_MISALIGNED, "key: data at ");
    SPOILT(c.value.shape[2] = -1, QKV_ERROR_VALUE, "value: shape [2, 2, -1, 8]");
    SPOILT(c.value.shape[0] = INT64_MIN, QKV_ERROR_VALUE, "value: shape");
    SPOILT(c.query.shape[1] = INT64_MAX, QKV_ERROR_TOO_LARGE, "query: shape");
    SPOILT(c.query.shape[1] = c.query.shape[2] = INT64_C(1) << 32, QKV_ERROR_TOO_LARGE, "query: shape");
    SPOILT(c.query.strides[0] = INT64_MAX, QKV_ERROR_TOO_LARGE, "query: shape");
    SPOILT(c.query.strides[0] = INT64_MIN, QKV_ERROR_TOO_LARGE, "query: shape");
    SPOILT(c.query.strides[2] = INT64_C(1) << 61, QKV_ERROR_TOO_LARGE, "query: shape");
    SPOILT(c.query.strides[3] = 2, QKV_ERROR_STRIDES, "query: the last axis (head dim) has stride 2, expected 1");
    SPOILT(c.query.dtype = 99, QKV_ERROR_DTYPE, "query: dtype 99");
    SPOILT(c.query.dtype = QKV_DTYPE_BOOL, QKV_ERROR_DTYPE, "query: bool, expected f32, f16 or bf16");
    SPOILT(c.query.dtype = QKV_DTYPE_I8, QKV_ERROR_DTYPE, "query: int8, expected f32, f16 or bf16");
    SPOILT(c.key.dtype = QKV_DTYPE_I8, QKV_ERROR_NULL, "key.scales: NULL");
    SPOILT(c.key.scales = &c.value, QKV_ERROR_DTYPE, "key.scales: given for f32, expected NULL");
    SPOILT((c.key.dtype = QKV_DTYPE_I8, c.key.scales = &c.value, c.key.zeros = &c.query), QKV_ERROR_SHAPE,
           "key.scales: scales of shape");
    SPOILT(c.outputs.output.dtype = QKV_DTYPE_I8, QKV_ERROR_DTYPE, "output: int8, expected f32, f16 or bf16");
    SPOILT(c.query.reserved = 1, QKV_ERROR_NOT_SUPPORTED, "query: reserved is 1");

    SPOILT(c.key.shape[0] = 1, QKV_ERROR_SHAPE, "key: batch is 1, expected 2 to match query");
    SPOILT(c.key.shape[3] = 4, QKV_ERROR_SHAPE, "key: head dim is 4, expected 8 to match query");
    SPOILT(c.value.shape[2] = 6, QKV_ERROR_SHAPE, "value: length is 6, expected 7 to match key");
    SPOILT(c.query.shape[1] = 3, QKV_ERROR_SHAPE, "query: 3 heads, expected a multiple of the 2 key/value heads");
    SPOILT(c.key.shape[1] = c.value.shape[1] = 0, QKV_ERROR_SHAPE, "key: heads is 0");
    SPOILT(c.outputs.output.shape[2] = 4, QKV_ERROR_SHAPE, "output: length is 4, expected 5 to match query");

    /* A buffer that is named is not left. */
    SPOILT((c.query.buffer = q, c.query.buffer_size = sizeof q - 1), QKV_ERROR_OUT_OF_BOUNDS, "query: shape");
    SPOILT((c.query.buffer = q + 1, c.query.buffer_size = sizeof q), QKV_ERROR_OUT_OF_BOUNDS, "query: shape");
    SPOILT((c.query.buffer = q, c.query.buffer_size = sizeof q, c.query.strides[0] = -H * S * D),
           QKV_ERROR_OUT_OF_BOUNDS, "query: shape");
    SPOILT((c.outputs.output.buffer = out, c.outputs.output.buffer_size = 16), QKV_ERROR_OUT_OF_BOUNDS, "output: shape");

    /* Outputs lie in nothing else, nor in themselves. */
    SPOILT(c.outputs.output.data = q, QKV_ERROR_OVERLAP, "output: shares memory with query");
    SPOILT((c.outputs.output.data = k, c.outputs.output.shape[0] = 0), QKV_ERROR_SHAPE, "output: batch is 0");
    SPOILT(c.outputs.output.strides[0] = 0, QKV_ERROR_STRIDES, "output: shape");
    SPOILT((c.outputs.lse.data = out, c.outputs.lse.count = B * H * S), QKV_ERROR_OVERLAP,
           "lse: shares memory with output");
    SPOILT((c.outputs.lse.data = lse, c.outputs.lse.count = B * H * S, c.outputs.maxima = c.outputs.lse),
           QKV_ERROR_OVERLAP, "maxima: shares memory with lse");
    SPOILT((c.outputs.lse.data = lse, c.outputs.lse.count = 1), QKV_ERROR_SHAPE, "lse: 1 values, expected");
    SPOILT(c.outputs.lse.count = 1, QKV_ERROR_NULL, "lse: NULL");
    SPOILT((c.outputs.lse.data = lse, c.outputs.lse.count = SIZE_MAX), QKV_ERROR_TOO_LARGE, "lse: ");
    SPOILT((c.outputs.lse.data = (float *)((char *)lse + 1), c.outputs.lse.count = B * H * S), QKV_ERROR_MISALIGNED,
           "lse: at ");

    for (size_t i = 0; i < B * H * S * D; i++) {
        if (out[i] != untouched) {
            TRUE(!"a refused call has written to the output");
            return;
        }
    }
    TRUE(!0);

    /* Nothing to do is nothing wrong, whatever the addresses; sizes beside a 0 may not be absurd. */
    SPOILT((c.query.shape[2] = c.outputs.output.shape[2] = 0, c.query.data = NULL, c.outputs.output.data = NULL), QKV_OK,
           "");
    SPOILT((c.query.shape[2] = c.outputs.output.shape[2] = 0, c.query.shape[1] = c.outputs.output.shape[1] = INT64_MAX),
           QKV_ERROR_TOO_LARGE, "query: shape");
    SPOILT(c.query.shape[0] = c.key.shape[0] = c.value.shape[0] = c.outputs.output.shape[0] = 0, QKV_OK, "");
    SPOILT((c.key.shape[2] = c.value.shape[2] = 0, c.key.data = NULL), QKV_OK, "");
    TRUE(out[0] == 0.0f);
}

static void options(void) {
    static unsigned char mask[B * H * S * T];
    static float bias[S * T];
    qkv_tensor mask_tensor = qkv_tensor_bhsd(mask, QKV_DTYPE_BOOL, B, H, S, T);
    qkv_tensor bias_tensor = qkv_tensor_bhsd(bias, QKV_DTYPE_F32, 1, 1, S, T);
    float floats[H] = {0};
    const int64_t lengths[] = {3, 8}, negative[] = {3, -1};
    float nan = (float)NAN;

    SPOILT(c.options.struct_size = 0, QKV_ERROR_STRUCT_SIZE, "options: struct_size is 0, expected");
    SPOILT(c.options.struct_size = sizeof c.options - 1, QKV_ERROR_STRUCT_SIZE, "options: struct_size");
    SPOILT(c.options.struct_size = SIZE_MAX, QKV_ERROR_STRUCT_SIZE, "options: struct_size");
    SPOILT(c.outputs.struct_size = 1, QKV_ERROR_STRUCT_SIZE, "outputs: struct_size");
    struct {
        qkv_attention_options options;
        uint64_t more;
    } newer = {qkv_attention_options_init(), 0};
    newer.options.struct_size = sizeof newer;
    call c = good();
    EXPECT(qkv_attention(&c.query, &c.key, &c.value, &newer.options, &c.outputs), QKV_OK, "");
    newer.more = 1;
    EXPECT(qkv_attention(&c.query, &c.key, &c.value, &newer.options, &c.outputs), QKV_ERROR_NOT_SUPPORTED,
           "options: byte ");

    SPOILT((c.options.has_scale = 1, c.options.scale = nan), QKV_ERROR_VALUE, "scale: NaN, expected a finite number");
    SPOILT((c.options.has_scale = 1, c.options.scale = (float)INFINITY), QKV_ERROR_VALUE, "scale: inf");
    SPOILT(c.options.has_scale = 2, QKV_ERROR_VALUE, "has_scale: 2, expected 0 or 1");
    SPOILT(c.options.scale = 1, QKV_ERROR_VALUE, "scale: given, expected 0 without has_scale");
    SPOILT(c.options.softcap = nan, QKV_ERROR_VALUE, "softcap: NaN");
    SPOILT(c.options.softcap = -1, QKV_ERROR_VALUE, "softcap: -1");
    SPOILT(c.options.causal = 4, QKV_ERROR_VALUE, "causal: 4, expected a QKV_CAUSAL_ number");
    SPOILT(c.options.causal_offset = 1, QKV_ERROR_VALUE, "causal_offset: given");
    SPOILT((c.options.causal = QKV_CAUSAL_OFFSET, c.options.causal_offset = INT64_MIN), QKV_OK, "");
    TRUE(out[0] == 0.0f && out[B * H * S * D - 1] == 0.0f);
    SPOILT((c.options.causal = QKV_CAUSAL_OFFSET, c.options.causal_offset = INT64_MAX), QKV_OK, "");
    SPOILT(c.options.window_left = 3, QKV_ERROR_VALUE, "window: given, expected 0 without has_window");
    SPOILT((c.options.has_window = 1, c.options.window_left = -2), QKV_ERROR_VALUE, "window_left: -2");
    SPOILT((c.options.has_window = 1, c.options.window_dilation = -1), QKV_ERROR_VALUE, "window_dilation: -1");
    SPOILT((c.options.has_window = 1, c.options.window_left = INT64_MAX, c.options.window_right = INT64_MAX), QKV_OK, "");
    SPOILT((c.options.has_window = 1, c.options.window_dilation = INT64_MAX), QKV_OK, "");

    SPOILT(c.options.mask = &bias_tensor, QKV_ERROR_DTYPE, "mask: f32, expected bool");
    SPOILT(c.options.bias = &mask_tensor, QKV_ERROR_DTYPE, "bias: bool, expected f32, f16 or bf16");
    SPOILT(c.options.mask = &mask_tensor, QKV_OK, "");
    mask[B * H * S * T - 2] = 255;
    SPOILT(c.options.mask = &mask_tensor, QKV_ERROR_VALUE, "mask[1][3][4][5]: 255, expected 0 or 1");
    qkv_tensor backwards = mask_tensor;
    backwards.data = mask + B * H * S * T - 1;
    for (int i = 0; i < 4; i++) backwards.strides[i] = -backwards.strides[i];
    SPOILT(c.options.mask = &backwards, QKV_ERROR_VALUE, "mask[0][0][0][1]: 255, expected 0 or 1");
    mask_tensor.shape[3] = T - 1;
    SPOILT(c.options.mask = &mask_tensor, QKV_ERROR_SHAPE, "mask: shape [2, 4, 5, 6] does not broadcast to [2, 4, 5, 7]");
    bias_tensor.shape[0] = 3;
    SPOILT(c.options.bias = &bias_tensor, QKV_ERROR_SHAPE, "bias: shape [3, 1, 5, 7] does not broadcast");
    bias_tensor.shape[0] = 1;
    bias_tensor.data = out;
    SPOILT(c.options.bias = &bias_tensor, QKV_ERROR_OVERLAP, "output: shares memory with bias");

    SPOILT((c.options.sinks.data = floats, c.options.sinks.count = H - 1), QKV_ERROR_SHAPE, "sinks: 3 entries, expected 4");
    SPOILT(c.options.sinks.count = H, QKV_ERROR_NULL, "sinks: NULL");
    SPOILT((c.options.sinks.data = floats, c.options.sinks.count = SIZE_MAX / 2), QKV_ERROR_TOO_LARGE, "sinks: ");
    SPOILT((c.options.alibi_slopes.data = floats, c.options.alibi_slopes.count = 3), QKV_ERROR_SHAPE, "alibi_slopes: 3");
    floats[2] = nan;
    SPOILT((c.options.alibi_slopes.data = floats, c.options.alibi_slopes.count = H), QKV_ERROR_VALUE,
           "alibi_slopes[2]: NaN, expected a finite number");
    SPOILT((c.options.key_lengths.data = lengths, c.options.key_lengths.count = 2), QKV_ERROR_VALUE,
           "key_lengths[1]: 8, expected at most 7");
    SPOILT((c.options.key_lengths.data = negative, c.options.key_lengths.count = 2), QKV_ERROR_VALUE,
           "key_lengths[1]: -1, expected 0 or more");
    SPOILT((c.options.key_lengths.data = lengths, c.options.key_lengths.count = 1), QKV_ERROR_SHAPE,
           "key_lengths: 1 entries, expected 2");
    SPOILT((c.options.prefix.data = lengths, c.options.prefix.count = 2), QKV_ERROR_NOT_SUPPORTED, "prefix: not supported");
    SPOILT((c.options.documents.data = lengths, c.options.documents.count = 2), QKV_ERROR_VALUE, "documents[1]: 8");
    SPOILT(c.options.t5_buckets = 4, QKV_ERROR_VALUE, "t5_buckets");
    SPOILT((c.options.t5_table.data = floats, c.options.t5_table.count = H, c.options.t5_buckets = 1), QKV_ERROR_VALUE,
           "t5_bias: 1 buckets");
    mask_tensor = qkv_tensor_bhsd(mask, QKV_DTYPE_BOOL, 1, 1, 1, 1);
    SPOILT(c.options.block_mask = &mask_tensor, QKV_ERROR_VALUE, "block_mask: blocks of [0, 0]");
    SPOILT((c.options.block_mask = &mask_tensor, c.options.block_mask_queries = 2, c.options.block_mask_keys = 2),
           QKV_ERROR_SHAPE, "block_mask: shape [1, 1, 1, 1] does not broadcast");
    mask_tensor.shape[2] = mask_tensor.shape[3] = INT64_C(1) << 28;
    mask_tensor.strides[2] = mask_tensor.strides[3] = 0;
    SPOILT((c.options.block_mask = &mask_tensor, c.options.block_mask_queries = 2, c.options.block_mask_keys = 2),
           QKV_ERROR_MEMORY, "block_mask: shape ");
    mask_tensor = qkv_tensor_bhsd(NULL, QKV_DTYPE_BOOL, INT64_C(1) << 40, 1, 1, 0);
    SPOILT((c.options.block_mask = &mask_tensor, c.options.block_mask_queries = 2, c.options.block_mask_keys = 2),
           QKV_ERROR_SHAPE, "block_mask: shape ");
    SPOILT(c.options.rotary = (const qkv_rotary *)&mask_tensor, QKV_ERROR_HANDLE, "rotary: handle ");
    SPOILT((c.options.rotary_positions.data = lengths, c.options.rotary_positions.count = 2), QKV_ERROR_SHAPE,
           "rotary_positions: 2 entries");
}

static void sequences(void) {
    const int64_t good_ends[] = {0, 2, S}, good_keys[] = {0, 4, T}, falling[] = {0, 6, S}, negative[] = {-1, 2, S};
    qkv_integers ends = {good_ends, 3}, key_ends = {good_keys, 3}, none = {NULL, 0}, bad = {falling, 3}, less = {negative, 3};
    qkv_tensor query = qkv_tensor_bhsd(q, QKV_DTYPE_F32, 1, H, S, D);
    qkv_tensor key = qkv_tensor_bhsd(k, QKV_DTYPE_F32, 1, KV, T, D);
    qkv_attention_outputs outputs = qkv_attention_outputs_init(qkv_tensor_mut_bhsd(out, QKV_DTYPE_F32, 1, H, S, D));
    EXPECT(qkv_attention_packed(&query, &key, &key, ends, key_ends, NULL, &outputs), QKV_OK, "");
    EXPECT(qkv_attention_packed(&query, &key, &key, none, key_ends, NULL, &outputs), QKV_ERROR_NULL, "query_ends: NULL");
    EXPECT(qkv_attention_packed(&query, &key, &key, bad, key_ends, NULL, &outputs), QKV_ERROR_VALUE, "query_ends[1]: 6");
    EXPECT(qkv_attention_packed(&query, &key, &key, less, key_ends, NULL, &outputs), QKV_ERROR_VALUE, "query_ends[0]: -1");
    ends.count = 2;
    EXPECT(qkv_attention_packed(&query, &key, &key, ends, key_ends, NULL, &outputs), QKV_ERROR_SHAPE, "query_ends: 2");
    ends.count = 0;
    EXPECT(qkv_attention_packed(&query, &key, &key, ends, key_ends, NULL, &outputs), QKV_ERROR_SHAPE, "query_ends: 0");
    ends.count = 3;
    unsigned char bits[1] = {1};
    qkv_tensor mask = qkv_tensor_bhsd(bits, QKV_DTYPE_BOOL, 1, 1, 1, 1);
    qkv_attention_options options = qkv_attention_options_init();
    options.mask = &mask;
    EXPECT(qkv_attention_packed(&query, &key, &key, ends, key_ends, &options, &outputs), QKV_ERROR_NOT_SUPPORTED,
           "mask: not supported together with a packed batch");

    /* Pages: (2 pages, KV, 3 tokens, D) in k. */
    const uint32_t tables[] = {0, 1, 1, 9};
    const int64_t lengths[] = {5, 3}, long_lengths[] = {5, 7}, far_lengths[] = {5, 4};
    qkv_tensor pool = qkv_tensor_bhsd(k, QKV_DTYPE_F32, 2, KV, 3, D);
    qkv_pages pages = {&pool, &pool, tables, 2, {lengths, 2}};
    EXPECT(qkv_attention_paged(&query, ends, &pages, NULL, &outputs), QKV_OK, "");
    EXPECT(qkv_attention_paged(&query, ends, NULL, NULL, &outputs), QKV_ERROR_NULL, "pages: NULL");
    pages.lengths.data = long_lengths;
    EXPECT(qkv_attention_paged(&query, ends, &pages, NULL, &outputs), QKV_ERROR_VALUE, "lengths[1]: 7, expected at most 6");
    pages.lengths.data = far_lengths;
    EXPECT(qkv_attention_paged(&query, ends, &pages, NULL, &outputs), QKV_ERROR_VALUE, "tables[1]: 9, expected at most 1");
    pages.lengths.data = lengths;
    pages.tables = (const uint32_t *)out;
    pages.tables_stride = 8;
    memset(out, 0, sizeof out);
    EXPECT(qkv_attention_paged(&query, ends, &pages, NULL, &outputs), QKV_ERROR_OVERLAP, "output: shares memory with tables");
    pages.tables = tables;
    pages.tables_stride = SIZE_MAX;
    EXPECT(qkv_attention_paged(&query, ends, &pages, NULL, &outputs), QKV_ERROR_TOO_LARGE, "tables: ");
    pages.tables_stride = 2;
    pages.tables = NULL;
    EXPECT(qkv_attention_paged(&query, ends, &pages, NULL, &outputs), QKV_ERROR_NULL, "tables: NULL");
    pages.tables = tables;
    pages.keys = NULL;
    EXPECT(qkv_attention_paged(&query, ends, &pages, NULL, &outputs), QKV_ERROR_NULL, "keys: NULL");
}

static void caches(void) {
    qkv_cache_config config = qkv_cache_config_init();
    qkv_cache *cache = NULL, *old;
    EXPECT(qkv_cache_create(&config, &cache), QKV_ERROR_VALUE, "kv_heads: 0");
    config.batch = B, config.kv_heads = KV, config.capacity = 16, config.key_dim = config.value_dim = D;
    EXPECT(qkv_cache_create(NULL, &cache), QKV_ERROR_NULL, "config: NULL");
    EXPECT(qkv_cache_create(&config, NULL), QKV_ERROR_NULL, "cache: NULL");
    EXPECT(qkv_cache_create(&config, (qkv_cache **)((char *)&cache + 1)), QKV_ERROR_MISALIGNED, "cache: at ");
    config.capacity = -1;
    EXPECT(qkv_cache_create(&config, &cache), QKV_ERROR_VALUE, "capacity: -1, expected 0 or more");
    config.capacity = INT64_MAX;
    EXPECT(qkv_cache_create(&config, &cache), QKV_ERROR_MEMORY, "keys: shape ");
    config.capacity = INT64_C(1) << 50;
    EXPECT(qkv_cache_create(&config, &cache), QKV_ERROR_MEMORY, "keys: shape ");
    config.capacity = 16;
    config.dtype = QKV_DTYPE_BOOL;
    EXPECT(qkv_cache_create(&config, &cache), QKV_ERROR_DTYPE, "dtype: 4");
    config.dtype = QKV_DTYPE_F32;
    config.group = 4;
    EXPECT(qkv_cache_create(&config, &cache), QKV_ERROR_VALUE, "group, zero_point: given");
    config.group = 0;
    config.window = 9;
    EXPECT(qkv_cache_create(&config, &cache), QKV_ERROR_VALUE, "window: 9");
    config.window = 0;
    TRUE(cache == NULL);
    EXPECT(qkv_cache_create(&config, &cache), QKV_OK, "");

    qkv_tensor key = qkv_tensor_bhsd(k, QKV_DTYPE_F32, B, KV, T, D), query = qkv_tensor_bhsd(q, QKV_DTYPE_F32, B, H, 1, D);
    qkv_attention_outputs outputs = qkv_attention_outputs_init(qkv_tensor_mut_bhsd(out, QKV_DTYPE_F32, B, H, 1, D));
    EXPECT(qkv_cache_attention(cache, &query, NULL, &outputs), QKV_OK, "");
    EXPECT(qkv_cache_append(cache, &key, &key, NULL), QKV_OK, "");
    key.shape[1] = 1;
    EXPECT(qkv_cache_append(cache, &key, &key, NULL), QKV_ERROR_SHAPE, "key: heads is 1, expected 2");
    key.shape[1] = KV;
    EXPECT(qkv_cache_append_to(cache, B, &key, &key, NULL), QKV_ERROR_VALUE, "batch: 2, expected an index below 2");
    EXPECT(qkv_cache_append_to(cache, INT64_MIN, &key, &key, NULL), QKV_ERROR_VALUE, "batch: -");
    EXPECT(qkv_cache_append(cache, &key, &key, (const qkv_rotary *)cache), QKV_ERROR_HANDLE, "rotary: handle ");
    key.shape[2] = INT64_C(1) << 40;
    key.strides[2] = 0;
    EXPECT(qkv_cache_append(cache, &key, &key, NULL), QKV_ERROR_FULL, "key: 1099511627776 new tokens");
    qkv_attention_options options = qkv_attention_options_init();
    const int64_t lengths[] = {1, 1};
    options.key_lengths.data = lengths;
    options.key_lengths.count = 2;
    EXPECT(qkv_cache_attention(cache, &query, &options, &outputs), QKV_ERROR_NOT_SUPPORTED, "key_lengths: not supported");
    query.shape[1] = 3;
    EXPECT(qkv_cache_attention(cache, &query, NULL, &outputs), QKV_ERROR_SHAPE, "query: 3 heads");
    query.shape[1] = H;
    TRUE(qkv_cache_length(cache, 0) == T && qkv_cache_length(cache, B) == -1 && qkv_cache_dropped(NULL, 0) == -1);

    /* Handles that are gone, of another kind, or no handles at all. */
    old = cache;
    EXPECT(qkv_cache_destroy(cache), QKV_OK, "");
    EXPECT(qkv_cache_create(&config, &cache), QKV_OK, "");
    TRUE(cache != old);
    EXPECT(qkv_cache_destroy(old), QKV_ERROR_HANDLE, "cache: handle ");
    EXPECT(qkv_cache_append(old, &key, &key, NULL), QKV_ERROR_HANDLE, "cache: handle ");
    EXPECT(qkv_cache_attention(old, &query, NULL, &outputs), QKV_ERROR_HANDLE, "cache: handle ");
    EXPECT(qkv_paged_cache_destroy((qkv_paged_cache *)cache), QKV_ERROR_HANDLE, "cache: handle ");
    EXPECT(qkv_attention_plan_destroy((qkv_attention_plan *)cache), QKV_ERROR_HANDLE, "plan: handle ");
    EXPECT(qkv_cache_destroy((qkv_cache *)q), QKV_ERROR_HANDLE, "cache: handle ");
    EXPECT(qkv_cache_destroy(NULL), QKV_OK, "");
    EXPECT(qkv_cache_destroy(cache), QKV_OK, "");

    qkv_paged_cache_config paged = qkv_paged_cache_config_init();
    qkv_paged_cache *pages = NULL;
    paged.pages = 2, paged.kv_heads = KV, paged.key_dim = paged.value_dim = D;
    EXPECT(qkv_paged_cache_create(&paged, &pages), QKV_ERROR_VALUE, "page_size: 0");
    paged.page_size = INT64_MAX;
    EXPECT(qkv_paged_cache_create(&paged, &pages), QKV_ERROR_MEMORY, "keys: shape ");
    paged.page_size = 4;
    EXPECT(qkv_paged_cache_create(&paged, &pages), QKV_OK, "");
    qkv_sequence sequence = qkv_paged_cache_sequence(pages);
    key = qkv_tensor_bhsd(k, QKV_DTYPE_F32, 1, KV, T, D);
    EXPECT(qkv_paged_cache_append(pages, sequence, &key, &key, NULL), QKV_OK, "");
    EXPECT(qkv_paged_cache_append(pages, sequence, &key, &key, NULL), QKV_ERROR_FULL, "key: the new tokens need 2 pages");
    EXPECT(qkv_paged_cache_append(pages, 77, &key, &key, NULL), QKV_ERROR_SEQUENCE, "sequence: 77");
    EXPECT(qkv_paged_cache_truncate(pages, sequence, -1), QKV_ERROR_VALUE, "length: -1");
    EXPECT(qkv_paged_cache_truncate(pages, sequence, 99), QKV_ERROR_VALUE, "length: 99, expected at most the 7");
    TRUE(qkv_paged_cache_fork(pages, 77) == 0 && qkv_paged_cache_length(pages, 77) == -1);
    const int64_t ends[] = {0, 1};
    qkv_integers list = {ends, 2};
    query = qkv_tensor_bhsd(q, QKV_DTYPE_F32, 1, H, 1, D);
    outputs = qkv_attention_outputs_init(qkv_tensor_mut_bhsd(out, QKV_DTYPE_F32, 1, H, 1, D));
    EXPECT(qkv_paged_cache_attention(pages, &sequence, &query, list, NULL, &outputs), QKV_OK, "");
    EXPECT(qkv_paged_cache_attention(pages, NULL, &query, list, NULL, &outputs), QKV_ERROR_NULL, "sequences: NULL");
    EXPECT(qkv_paged_cache_free(pages, sequence), QKV_OK, "");
    EXPECT(qkv_paged_cache_attention(pages, &sequence, &query, list, NULL, &outputs), QKV_ERROR_SEQUENCE, "sequence: 1");
    TRUE(qkv_paged_cache_free_pages(pages) == 2);
    EXPECT(qkv_paged_cache_destroy(pages), QKV_OK, "");
    TRUE(qkv_paged_cache_sequence(pages) == 0 && qkv_paged_cache_free_pages(NULL) == -1);
}

static void others(void) {
    qkv_tensor a = qkv_matrix(q, 4, 4), b = qkv_matrix(k, 4, 4);
    qkv_tensor_mut c = qkv_matrix_mut(out, 4, 4);
    qkv_gemm_options options = qkv_gemm_options_init();
    EXPECT(qkv_gemm(&a, &b, &c, NULL), QKV_OK, "");
    EXPECT(qkv_gemm(&a, &b, NULL, NULL), QKV_ERROR_NULL, "c: NULL");
    EXPECT(qkv_gemm(NULL, &b, &c, NULL), QKV_ERROR_NULL, "a: NULL");
    options.activation = 5;
    EXPECT(qkv_gemm(&a, &b, &c, &options), QKV_ERROR_VALUE, "activation: 5");
    options.activation = 0;
    options.alpha = 1;
    EXPECT(qkv_gemm(&a, &b, &c, &options), QKV_ERROR_VALUE, "alpha: given");
    options.alpha = 0;
    options.bias.data = v;
    options.bias.count = 3;
    EXPECT(qkv_gemm(&a, &b, &c, &options), QKV_ERROR_SHAPE, "bias: 3 entries, expected 4");
    options.struct_size = 8;
    EXPECT(qkv_gemm(&a, &b, &c, &options), QKV_ERROR_STRUCT_SIZE, "options: struct_size is 8");
    c.data = (char *)out + 2;
    EXPECT(qkv_gemm(&a, &b, &c, NULL), QKV_ERROR_MISALIGNED, "c: data at ");
    c.data = q + 8;
    EXPECT(qkv_gemm(&a, &b, &c, NULL), QKV_ERROR_OVERLAP, "c: shares memory with a");
    EXPECT(qkv_packed_matrix_destroy((qkv_packed_matrix *)&a), QKV_ERROR_HANDLE, "packed: handle ");
    qkv_packed_matrix *packed = NULL;
    b.shape[2] = b.shape[3] = INT64_C(1) << 29;
    b.strides[2] = b.strides[3] = 0;
    EXPECT(qkv_packed_matrix_create(&b, &packed), QKV_ERROR_MEMORY, "b: a 536870912 x 536870912 matrix given");

    qkv_part part = {NULL, {NULL, 0}};
    qkv_attention_outputs outputs = qkv_attention_outputs_init(qkv_tensor_mut_bhsd(out, QKV_DTYPE_F32, 1, 1, 2, 4));
    EXPECT(qkv_merge(NULL, &part, &outputs), QKV_ERROR_NULL, "a: NULL");
    EXPECT(qkv_merge(&part, &part, &outputs), QKV_ERROR_NULL, "a.output: NULL");
    qkv_tensor side = qkv_tensor_bhsd(q, QKV_DTYPE_F32, 1, 1, 2, 4);
    part.output = &side;
    EXPECT(qkv_merge(&part, &part, &outputs), QKV_ERROR_NULL, "a.lse: NULL");
    part.lse.data = v;
    part.lse.count = 3;
    EXPECT(qkv_merge(&part, &part, &outputs), QKV_ERROR_SHAPE, "a.lse: 3 entries, expected 2");
    part.lse.count = 2;
    EXPECT(qkv_merge(&part, &part, &outputs), QKV_OK, "");
    side.dtype = QKV_DTYPE_F16;
    EXPECT(qkv_merge(&part, &part, &outputs), QKV_ERROR_DTYPE, "a.output: f16, expected f32");
    side = qkv_tensor_bhsd(NULL, QKV_DTYPE_F32, 1, 1, 0, INT64_C(1) << 50);
    outputs.output = qkv_tensor_mut_bhsd(NULL, QKV_DTYPE_F32, 1, 1, 0, INT64_C(1) << 50);
    part.lse.count = 0;
    EXPECT(qkv_merge(&part, &part, &outputs), QKV_OK, "");

    qkv_attention_plan *plan = NULL;
    qkv_tensor huge = qkv_tensor_bhsd(NULL, QKV_DTYPE_F32, 1, 1, INT64_C(1) << 40, 1);
    EXPECT(qkv_attention_plan_create(&huge, &huge, &huge, NULL, &plan), QKV_OK, "");
    TRUE(qkv_attention_plan_explain(plan) == NULL && qkv_attention_plan_explain(NULL) == NULL);
    EXPECT(qkv_attention_plan_destroy(plan), QKV_OK, "");
    huge.dtype = QKV_DTYPE_BOOL;
    EXPECT(qkv_attention_plan_create(&huge, &huge, &huge, NULL, &plan), QKV_ERROR_DTYPE, "query: bool");

    qkv_cpu_info info = qkv_cpu_info_init();
    EXPECT(qkv_cpu_info_get(NULL), QKV_ERROR_NULL, "info: NULL");
    info.struct_size = 3;
    EXPECT(qkv_cpu_info_get(&info), QKV_ERROR_STRUCT_SIZE, "info: struct_size is 3");
    EXPECT(qkv_set_num_threads(0), QKV_ERROR_VALUE, "threads: 0");
    EXPECT(qkv_set_num_threads(SIZE_MAX), QKV_ERROR_VALUE, "threads: ");
    TRUE(strcmp(qkv_status_name(-5), "unknown") == 0 && strcmp(qkv_status_name(QKV_ERROR_FULL), "QKV_ERROR_FULL") == 0);
}

int main(void) {
    TRUE(qkv_last_error_message()[0] == '\0');
    tensors();
    options();
    sequences();
    caches();
    others();
    printf("hostile.c: %d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
