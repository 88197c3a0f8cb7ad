/*
 * Attention from C: causal attention with grouped heads against a naive loop, and decoding with a cache of pages, whose steps
 * must give the rows of the whole.
 *
 *     cc -std=c11 attention.c $(pkg-config --cflags --libs qkv) -lm -o attention && ./attention
 *
 * Prints the largest differences; exits with 1 where one is too large or a call fails.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <qkv.h>

enum { HEADS = 4, KV_HEADS = 2, LENGTH = 33, DIM = 16, PROMPT = 20, PAGE = 8 };

static float q[HEADS * LENGTH * DIM], k[KV_HEADS * LENGTH * DIM], v[KV_HEADS * LENGTH * DIM];
static float out[HEADS * LENGTH * DIM], lse[HEADS * LENGTH];

/* Stops the program where a call has failed. */
static void check(qkv_status status, const char *call) {
    if (status != QKV_OK) {
        fprintf(stderr, "%s: %s: %s\n", call, qkv_status_name(status), qkv_last_error_message());
        exit(1);
    }
}

/* Numbers between -1 and 1. */
static void fill(float *values, size_t count) {
    static uint32_t state = 1;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
}

/* One row by the book, in double: query i of a head sees keys 0 to i. */
static double naive_row(int head, int i, double *row) {
    const float *qi = q + (head * LENGTH + i) * DIM;
    int kv_head = head / (HEADS / KV_HEADS);
    double score[LENGTH], max = -INFINITY, sum = 0;
    for (int j = 0; j <= i; j++) {
        const float *kj = k + (kv_head * LENGTH + j) * DIM;
        score[j] = 0;
        for (int d = 0; d < DIM; d++) score[j] += (double)qi[d] * kj[d];
        score[j] /= sqrt(DIM);
        if (score[j] > max) max = score[j];
    }
    for (int d = 0; d < DIM; d++) row[d] = 0;
    for (int j = 0; j <= i; j++) {
        const float *vj = v + (kv_head * LENGTH + j) * DIM;
        double weight = exp(score[j] - max);
        sum += weight;
        for (int d = 0; d < DIM; d++) row[d] += weight * vj[d];
    }
    for (int d = 0; d < DIM; d++) row[d] /= sum;
    return max + log(sum);
}

/* The largest difference of output and LSE from the naive rows. */
static double whole(void) {
    qkv_tensor query = qkv_tensor_bhsd(q, QKV_DTYPE_F32, 1, HEADS, LENGTH, DIM);
    qkv_tensor key = qkv_tensor_bhsd(k, QKV_DTYPE_F32, 1, KV_HEADS, LENGTH, DIM);
    qkv_tensor value = qkv_tensor_bhsd(v, QKV_DTYPE_F32, 1, KV_HEADS, LENGTH, DIM);
    qkv_attention_options options = qkv_attention_options_init();
    options.causal = QKV_CAUSAL_TOP_LEFT;
    qkv_attention_outputs outputs =
        qkv_attention_outputs_init(qkv_tensor_mut_bhsd(out, QKV_DTYPE_F32, 1, HEADS, LENGTH, DIM));
    outputs.lse.data = lse;
    outputs.lse.count = HEADS * LENGTH;

    qkv_attention_plan *plan = NULL;
    check(qkv_attention_plan_create(&query, &key, &value, &options, &plan), "qkv_attention_plan_create");
    printf("plan: %s\n", qkv_attention_plan_explain(plan));
    check(qkv_attention_plan_destroy(plan), "qkv_attention_plan_destroy");

    check(qkv_attention(&query, &key, &value, &options, &outputs), "qkv_attention");
    double worst = 0;
    for (int head = 0; head < HEADS; head++) {
        for (int i = 0; i < LENGTH; i++) {
            double row[DIM], want = naive_row(head, i, row);
            worst = fmax(worst, fabs(lse[head * LENGTH + i] - want));
            for (int d = 0; d < DIM; d++) worst = fmax(worst, fabs(out[(head * LENGTH + i) * DIM + d] - row[d]));
        }
    }
    return worst;
}

/* Token i of a (1, heads, length, dim) tensor, in place: only the address and one size change. */
static qkv_tensor token(const float *values, int heads, int i, int count) {
    qkv_tensor tensor = qkv_tensor_bhsd(values + i * DIM, QKV_DTYPE_F32, 1, heads, LENGTH, DIM);
    tensor.shape[2] = count;
    return tensor;
}

/* Two sequences that share a prompt: the largest difference of their steps from the rows of the whole. */
static double decode(void) {
    qkv_paged_cache_config config = qkv_paged_cache_config_init();
    config.pages = 16;
    config.page_size = PAGE;
    config.kv_heads = KV_HEADS;
    config.key_dim = config.value_dim = DIM;
    config.dtype = QKV_DTYPE_F32;
    qkv_paged_cache *cache = NULL;
    check(qkv_paged_cache_create(&config, &cache), "qkv_paged_cache_create");

    qkv_sequence sequences[2];
    sequences[0] = qkv_paged_cache_sequence(cache);
    qkv_tensor key = token(k, KV_HEADS, 0, PROMPT), value = token(v, KV_HEADS, 0, PROMPT);
    check(qkv_paged_cache_append(cache, sequences[0], &key, &value, NULL), "qkv_paged_cache_append");
    sequences[1] = qkv_paged_cache_fork(cache, sequences[0]);

    double worst = 0;
    for (int i = PROMPT; i < LENGTH; i++) {
        /* The same token for both: stride 0 repeats it along the batch. */
        qkv_tensor query = token(q, HEADS, i, 1);
        key = token(k, KV_HEADS, i, 1);
        value = token(v, KV_HEADS, i, 1);
        query.shape[0] = key.shape[0] = value.shape[0] = 2;
        query.strides[0] = key.strides[0] = value.strides[0] = 0;
        float step[2 * HEADS * DIM];
        qkv_attention_outputs outputs =
            qkv_attention_outputs_init(qkv_tensor_mut_bhsd(step, QKV_DTYPE_F32, 2, HEADS, 1, DIM));
        check(qkv_paged_decode(cache, sequences, &query, &key, &value, NULL, &outputs), "qkv_paged_decode");
        for (int which = 0; which < 2 * HEADS; which++) {
            for (int d = 0; d < DIM; d++) {
                float want = out[(which % HEADS * LENGTH + i) * DIM + d];
                worst = fmax(worst, fabs(step[which * DIM + d] - want));
            }
        }
    }
    printf("pages: %d of %d free, %d of them shared by two sequences\n", (int)qkv_paged_cache_free_pages(cache),
           (int)qkv_paged_cache_pages(cache), PROMPT / PAGE);
    check(qkv_paged_cache_destroy(cache), "qkv_paged_cache_destroy");
    return worst;
}

int main(void) {
    qkv_cpu_info info = qkv_cpu_info_init();
    check(qkv_cpu_info_get(&info), "qkv_cpu_info_get");
    printf("qkv %s, %s, %d threads\n", qkv_version(), info.isa, (int)qkv_num_threads());
    fill(q, sizeof q / sizeof *q);
    fill(k, sizeof k / sizeof *k);
    fill(v, sizeof v / sizeof *v);

    double worst_whole = whole(), worst_decode = decode();
    printf("attention: largest difference from a naive loop %.1e\n", worst_whole);
    printf("decoding: largest difference from the whole %.1e\n", worst_decode);
    return worst_whole < 1e-5 && worst_decode < 1e-5 ? 0 : 1;
}
