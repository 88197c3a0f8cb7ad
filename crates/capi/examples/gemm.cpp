// qkv from C++: thin wrappers that own what they make and throw what goes wrong, then a projection with packed weights and
// attention on it, on std::vector.
//
//     c++ -std=c++17 gemm.cpp $(pkg-config --cflags --libs qkv) -o gemm && ./gemm
//
// Prints the largest differences from naive loops; exits with 1 where one is too large or a call fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <qkv.h>

namespace {

/// Throws the message of a call that failed.
void check(qkv_status status) {
    if (status != QKV_OK) {
        throw std::runtime_error(std::string(qkv_status_name(status)) + ": " + qkv_last_error_message());
    }
}

/// A handle that is destroyed with its owner.
struct Destroy {
    void operator()(qkv_packed_matrix *packed) const { qkv_packed_matrix_destroy(packed); }
    void operator()(qkv_attention_plan *plan) const { qkv_attention_plan_destroy(plan); }
};
using Packed = std::unique_ptr<qkv_packed_matrix, Destroy>;
using Plan = std::unique_ptr<qkv_attention_plan, Destroy>;

Packed pack(const qkv_tensor &b) {
    qkv_packed_matrix *packed = nullptr;
    check(qkv_packed_matrix_create(&b, &packed));
    return Packed(packed);
}

Plan plan(const qkv_tensor &q, const qkv_tensor &k, const qkv_tensor &v, const qkv_attention_options &options) {
    qkv_attention_plan *plan = nullptr;
    check(qkv_attention_plan_create(&q, &k, &v, &options, &plan));
    return Plan(plan);
}

/// A matrix over a vector, which qkv then never leaves.
qkv_tensor matrix(const std::vector<float> &values, std::int64_t rows, std::int64_t columns) {
    qkv_tensor tensor = qkv_matrix(values.data(), rows, columns);
    tensor.buffer = values.data();
    tensor.buffer_size = values.size() * sizeof(float);
    return tensor;
}

qkv_tensor_mut matrix_mut(std::vector<float> &values, std::int64_t rows, std::int64_t columns) {
    qkv_tensor_mut tensor = qkv_matrix_mut(values.data(), rows, columns);
    tensor.buffer = values.data();
    tensor.buffer_size = values.size() * sizeof(float);
    return tensor;
}

constexpr int kTokens = 24, kWidth = 32, kHeads = 4, kDim = kWidth / kHeads;

}  // namespace

int main() try {
    std::mt19937 engine(1);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    const auto random = [&](std::size_t count) {
        std::vector<float> values(count);
        std::generate(values.begin(), values.end(), [&] { return uniform(engine); });
        return values;
    };

    // One projection to queries, keys and values: (tokens, width) x (width, 3 width) + bias, weights packed once.
    const std::vector<float> x = random(kTokens * kWidth), bias = random(3 * kWidth);
    std::vector<float> weights = random(kWidth * 3 * kWidth);
    const Packed packed = pack(matrix(weights, kWidth, 3 * kWidth));
    std::vector<float> projected(kTokens * 3 * kWidth);
    qkv_gemm_options gemm_options = qkv_gemm_options_init();
    gemm_options.bias.data = bias.data();
    gemm_options.bias.count = bias.size();
    const qkv_tensor a = matrix(x, kTokens, kWidth);
    const qkv_tensor_mut c = matrix_mut(projected, kTokens, 3 * kWidth);
    check(qkv_gemm_packed(&a, packed.get(), &c, &gemm_options));

    double worst_gemm = 0;
    for (int i = 0; i < kTokens; i++) {
        for (int j = 0; j < 3 * kWidth; j++) {
            double sum = bias[j];
            for (int p = 0; p < kWidth; p++) sum += double(x[i * kWidth + p]) * weights[p * 3 * kWidth + j];
            worst_gemm = std::max(worst_gemm, std::fabs(projected[i * 3 * kWidth + j] - sum));
        }
    }

    // Queries, keys and values are read where they lie: (tokens, [q, k, v], heads, dim), seen as (1, heads, tokens, dim).
    const auto part = [&](int which) {
        const float *first = projected.data() + which * kWidth;
        qkv_tensor tensor = qkv_tensor_bhsd(first, QKV_DTYPE_F32, 1, kHeads, kTokens, kDim);
        tensor.strides[1] = kDim;
        tensor.strides[2] = 3 * kWidth;
        tensor.buffer = projected.data();
        tensor.buffer_size = projected.size() * sizeof(float);
        return tensor;
    };
    const qkv_tensor q = part(0), k = part(1), v = part(2);
    qkv_attention_options options = qkv_attention_options_init();
    options.has_window = 1;
    options.window_left = 7;
    options.window_right = 0;
    std::vector<float> out(kTokens * kWidth);
    const qkv_attention_outputs outputs =
        qkv_attention_outputs_init(qkv_tensor_mut_bshd(out.data(), QKV_DTYPE_F32, 1, kHeads, kTokens, kDim));
    const Plan attention = plan(q, k, v, options);
    check(qkv_attention_plan_run(attention.get(), &q, &k, &v, &outputs));

    double worst_attention = 0;
    for (int h = 0; h < kHeads; h++) {
        for (int i = 0; i < kTokens; i++) {
            const auto at = [&](int which, int token, int d) {
                return double(projected[token * 3 * kWidth + which * kWidth + h * kDim + d]);
            };
            std::vector<double> row(kDim);
            double sum = 0;
            for (int j = std::max(0, i - 7); j <= i; j++) {
                double score = 0;
                for (int d = 0; d < kDim; d++) score += at(0, i, d) * at(1, j, d);
                const double weight = std::exp(score / std::sqrt(double(kDim)));
                sum += weight;
                for (int d = 0; d < kDim; d++) row[d] += weight * at(2, j, d);
            }
            for (int d = 0; d < kDim; d++) {
                const double got = out[i * kWidth + h * kDim + d];
                worst_attention = std::max(worst_attention, std::fabs(got - row[d] / sum));
            }
        }
    }

    // What goes wrong is an exception with the argument's name in it.
    std::string refusal = "none";
    try {
        const qkv_tensor short_by_one = matrix(x, kTokens + 1, kWidth);
        check(qkv_gemm_packed(&short_by_one, packed.get(), &c, &gemm_options));
    } catch (const std::runtime_error &error) {
        refusal = error.what();
    }

    std::printf("projection: largest difference from a naive loop %.1e\n", worst_gemm);
    std::printf("attention with a window of 8: largest difference from a naive loop %.1e\n", worst_attention);
    std::printf("a matrix that leaves its vector: %s\n", refusal.c_str());
    const bool refused = refusal.rfind("QKV_ERROR_OUT_OF_BOUNDS: a: ", 0) == 0;
    return worst_gemm < 1e-5 && worst_attention < 1e-4 && refused ? 0 : 1;
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
