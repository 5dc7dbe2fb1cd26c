// What stable-diffusion.cpp computes, printed: compiled against its own headers by generate.py.
//
//   reference numbers               JSON: levels, timesteps, schedules, samplers
//   reference noise RNG SEED SIZES  float32 noise as bytes; SIZES "1,7,15": values per call
//   reference libm FUNCTION         float32 results as bytes, for every uniform value that a generator can draw
//   reference prompt TEXT           JSON: the pieces of a prompt and their weights

#define __GGML_EXTEND_HPP__  // denoiser.hpp needs nothing of it but this:
#define LOG_INFO(...)
#define LOG_WARN(...)
#define LOG_ERROR(...)
#define LOG_DEBUG(...)
#define SD_UNUSED(x) (void)(x)
#define GGML_ASSERT(x) ((x) ? (void)0 : std::abort())

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "stable-diffusion.h"

#include "denoiser.hpp"
#include "rng.hpp"
#include "rng_mt19937.hpp"
#include "rng_philox.hpp"
#include "util.h"

#ifdef NEWER  // what came after the package, see generate.py
namespace newer {
struct GuiderOutput {
    sd::Tensor<float> pred, pred_uncond;
};
typedef std::function<GuiderOutput(const sd::Tensor<float>&, float, int)> denoise_cb_t;
typedef std::map<std::string, std::string> SamplerExtraArgs;
#include "newer.hpp"
}  // namespace newer
#endif

namespace {

const int VALUES = 8;  // in the latents of the samplers' cases

std::shared_ptr<RNG> make_rng(const std::string& name, uint64_t seed) {
    std::shared_ptr<RNG> rng;
    if (name == "cuda") rng = std::make_shared<PhiloxRNG>();
    if (name == "cpu") rng = std::make_shared<MT19937RNG>();
    if (name == "std_default") rng = std::make_shared<STDDefaultRNG>();
    rng->manual_seed(seed);
    return rng;
}

std::shared_ptr<Denoiser> make_denoiser(const std::string& name, float shift) {
    std::shared_ptr<Denoiser> made;
    if (name == "eps") made = std::make_shared<CompVisDenoiser>();
    if (name == "v") made = std::make_shared<CompVisVDenoiser>();
    if (name == "edm_v") made = std::make_shared<EDMVDenoiser>();
    if (name == "sd3_flow") made = std::make_shared<DiscreteFlowDenoiser>(shift);
    if (name == "flux_flow") {
        auto flux = std::make_shared<FluxFlowDenoiser>();
        flux->set_shift(shift);
        made = flux;
    }
    if (auto scaled = std::dynamic_pointer_cast<CompVisDenoiser>(made)) {  // as calculate_alphas_cumprod and its caller
        float start = sqrtf(0.00085f), amount = sqrtf(0.0120f) - start, product = 1.0f;
        for (int i = 0; i < TIMESTEPS; i++) {
            product *= 1.0f - powf(start + amount * ((float)i / (TIMESTEPS - 1)), 2.0f);
            scaled->sigmas[i]     = std::sqrt((1 - product) / product);
            scaled->log_sigmas[i] = std::log(scaled->sigmas[i]);
        }
    }
    return made;
}

struct Predicted {
    const char* name;
    float shift;
};

const Predicted PREDICTED[] = {{"eps", 0}, {"v", 0}, {"edm_v", 0}, {"sd3_flow", 1}, {"sd3_flow", 3}, {"flux_flow", 1.15f}};

std::string key_of(const Predicted& predicted) {
    char text[64];
    snprintf(text, sizeof text, predicted.shift != 0 ? "%s:%g" : "%s", predicted.name, predicted.shift);
    return text;
}

struct Object {  // a JSON object of arrays of numbers, printed as it is filled
    bool first = true;
    Object(const char* name, bool very_first = false) { printf("%s\"%s\": {", very_first ? "" : ",\n", name); }
    ~Object() { printf("\n}"); }
    void add(const std::string& key, const std::vector<float>& values) {
        printf("%s\n\"%s\": [", first ? "" : ",", key.c_str());
        for (size_t i = 0; i < values.size(); i++) printf("%s%.9g", i ? ", " : "", values[i]);
        printf("]");
        first = false;
    }
};

void print_predictions() {
    Object object("predictions", true);  // sigma_min, sigma_max, then of each level: its timestep, skip, out, into
    for (const auto& predicted : PREDICTED) {
        auto denoiser = make_denoiser(predicted.name, predicted.shift);
        std::vector<float> row{denoiser->sigma_min(), denoiser->sigma_max()};
        for (float sigma : {0.02f, 0.0291671585f, 0.5f, 0.73f, 1.0f, 7.5f, 14.6000004f, 20.0f}) {
            row.push_back(denoiser->sigma_to_t(sigma));
            for (float scaling : denoiser->get_scalings(sigma)) row.push_back(scaling);
        }
        for (float timestep : {0.0f, 1.0f, 10.5f, 500.0f, 998.75f, 999.0f}) row.push_back(denoiser->t_to_sigma(timestep));
        object.add(key_of(predicted), row);
    }
}

void print_scale() {
    Object object("scale");  // the levels at some timesteps, as they are in the table
    auto denoiser = std::dynamic_pointer_cast<CompVisDenoiser>(make_denoiser("eps", 0));
    for (int timestep : {0, 1, 10, 250, 500, 750, 998, 999})
        object.add(std::to_string(timestep), {denoiser->sigmas[timestep], denoiser->log_sigmas[timestep]});
}

void print_starts() {
    Object object("starts");  // latents and noise of five values at a level
    sd::Tensor<float> latents({5}, {-1.5f, -0.25f, 0.0f, 0.7f, 3.0f}), noise({5}, {0.3f, -1.1f, 2.0f, 0.01f, -0.6f});
    for (const auto& predicted : PREDICTED)
        for (float sigma : {0.25f, 0.9f}) {
            auto started = make_denoiser(predicted.name, predicted.shift)->noise_scaling(sigma, noise, latents);
            char level[16];
            snprintf(level, sizeof level, " %g", sigma);
            object.add(key_of(predicted) + level, started.values());
        }
}

std::vector<float> sigmas_of(const std::string& name, int steps, Denoiser& denoiser, SDVersion version, int tokens) {
    static const std::map<std::string, scheduler_t> known = {
        {"discrete", DISCRETE_SCHEDULER}, {"karras", KARRAS_SCHEDULER}, {"exponential", EXPONENTIAL_SCHEDULER},
        {"ays", AYS_SCHEDULER}, {"gits", GITS_SCHEDULER}, {"sgm_uniform", SGM_UNIFORM_SCHEDULER},
        {"simple", SIMPLE_SCHEDULER}, {"smoothstep", SMOOTHSTEP_SCHEDULER}, {"kl_optimal", KL_OPTIMAL_SCHEDULER},
        {"lcm", LCM_SCHEDULER}, {"bong_tangent", BONG_TANGENT_SCHEDULER},
    };
    if (known.count(name)) return denoiser.get_sigmas(steps, tokens, known.at(name), version);
    std::shared_ptr<SigmaScheduler> made;
#ifdef NEWER
    if (name == "beta") made = std::make_shared<newer::BetaScheduler>();
    if (name == "ltx2") made = std::make_shared<newer::LTX2Scheduler>(tokens);
    if (name == "logit_normal") made = std::make_shared<newer::LogitNormalScheduler>(tokens);
    if (name == "flux") made = std::make_shared<newer::FluxScheduler>(tokens);
    if (name == "flux2") made = std::make_shared<newer::Flux2Scheduler>(tokens);
#endif
    if (!made) return {};
    auto t_to_sigma = [&](float t) { return denoiser.t_to_sigma(t); };
    return made->get_sigmas(steps, denoiser.sigma_min(), denoiser.sigma_max(), t_to_sigma);
}

void print_schedules() {
    Object object("schedules");  // keys: name, steps, prediction, family of ays, tokens
    struct Family {
        const char* name;
        SDVersion version;
    };
    for (const char* name : {"discrete", "karras", "exponential", "ays", "gits", "sgm_uniform", "simple", "smoothstep",
                             "kl_optimal", "lcm", "bong_tangent", "beta", "ltx2", "logit_normal", "flux", "flux2"})
        for (const auto& predicted : PREDICTED)
            for (const Family& family : {Family{"sd1", VERSION_SD1}, {"sdxl", VERSION_SDXL}, {"svd", VERSION_SVD}})
                for (int tokens : {256, 4096, 16384})
                    for (int steps : {2, 5, 10, 23}) {
                        bool eps = !strcmp(predicted.name, "eps");
                        bool sized = strchr("lf", name[0]) && strcmp(name, "lcm");
                        if ((!sized && tokens != 4096) || (strcmp(name, "ays") && strcmp(family.name, "sd1"))) continue;
                        if (!eps && (sized || !strcmp(name, "ays") || !strcmp(name, "gits"))) continue;
                        auto denoiser = make_denoiser(predicted.name, predicted.shift);
                        auto sigmas   = sigmas_of(name, steps, *denoiser, family.version, tokens);
                        if (sigmas.empty()) continue;
                        object.add(std::string(name) + " " + std::to_string(steps) + " " + key_of(predicted) + " " +
                                       family.name + " " + std::to_string(tokens),
                                   sigmas);
                    }
}

// The best guess for data that is normal around 0.25, and around -0.1 for the negative prompt.
sd::Tensor<float> guess(const sd::Tensor<float>& x, float sigma, float mean) {
    return x * (1.0f / (1.0f + sigma * sigma)) + mean;
}

sd::Tensor<float> sampled(const std::string& name, sd::Tensor<float> x, const std::vector<float>& sigmas,
                          std::shared_ptr<RNG> rng, float eta, bool flow) {
    static const std::map<std::string, sample_method_t> known = {
        {"euler", EULER_SAMPLE_METHOD}, {"euler_a", EULER_A_SAMPLE_METHOD}, {"heun", HEUN_SAMPLE_METHOD},
        {"dpm2", DPM2_SAMPLE_METHOD}, {"dpm++2s_a", DPMPP2S_A_SAMPLE_METHOD}, {"dpm++2m", DPMPP2M_SAMPLE_METHOD},
        {"dpm++2mv2", DPMPP2Mv2_SAMPLE_METHOD}, {"ipndm", IPNDM_SAMPLE_METHOD}, {"ipndm_v", IPNDM_V_SAMPLE_METHOD},
        {"lcm", LCM_SAMPLE_METHOD}, {"ddim_trailing", DDIM_TRAILING_SAMPLE_METHOD}, {"tcd", TCD_SAMPLE_METHOD},
        {"res_multistep", RES_MULTISTEP_SAMPLE_METHOD}, {"res_2s", RES_2S_SAMPLE_METHOD},
        {"er_sde", ER_SDE_SAMPLE_METHOD},
    };
    if (known.count(name)) {
        auto model = [](const sd::Tensor<float>& x, float sigma, int) { return guess(x, sigma, 0.25f); };
        return sample_k_diffusion(known.at(name), model, x, sigmas, rng, eta, flow);
    }
#ifdef NEWER
    auto model = [](const sd::Tensor<float>& x, float sigma, int) {
        return newer::GuiderOutput{guess(x, sigma, 0.25f), guess(x, sigma, -0.1f)};
    };
    if (name == "euler_cfg_pp") return newer::sample_euler_cfg_pp(model, x, sigmas);
    if (name == "euler_a_cfg_pp") return newer::sample_euler_ancestral_cfg_pp(model, x, sigmas, rng, eta);
    if (name == "euler_ge") return newer::sample_gradient_estimation(model, x, sigmas, rng, flow, eta, {});
    if (name == "dpm++2m_sde") return newer::sample_dpmpp_2m_sde(model, x, sigmas, rng, eta);
    if (name == "dpm++2m_sde_bt") return newer::sample_dpmpp_2m_sde_bt(model, x, sigmas, rng, eta);
    if (name == "lms") return newer::sample_lms(model, x, sigmas, {});
#endif
    return {};
}

void print_samplers() {
    Object object("samplers");  // keys: name, eta, prediction; six steps of karras or, for flow models, simple
    for (const char* name : {"euler", "euler_a", "heun", "dpm2", "dpm++2s_a", "dpm++2m", "dpm++2mv2", "ipndm", "ipndm_v",
                             "lcm", "ddim_trailing", "tcd", "res_multistep", "res_2s", "er_sde", "euler_cfg_pp",
                             "euler_a_cfg_pp", "euler_ge", "dpm++2m_sde", "dpm++2m_sde_bt", "lms"})
        for (float eta : {0.0f, 0.3f, 1.0f})
            for (const Predicted& predicted : {Predicted{"eps", 0}, {"flux_flow", 1.15f}}) {
                bool flow = predicted.shift != 0;
                if (flow && !strcmp(name, "ddim_trailing")) continue;  // euler_a by now, and no formula for flows then
                auto denoiser = make_denoiser(predicted.name, predicted.shift);
                auto sigmas   = denoiser->get_sigmas(6, 4096, flow ? SIMPLE_SCHEDULER : KARRAS_SCHEDULER, VERSION_SD1);
                auto rng      = make_rng("cuda", 3);
                auto noise    = sd::Tensor<float>({VALUES}, rng->randn(VALUES));
                auto x        = denoiser->noise_scaling(sigmas[0], noise, sd::Tensor<float>::zeros({VALUES}));
                auto result   = sampled(name, x, sigmas, rng, eta, flow);
                char suffix[64];
                snprintf(suffix, sizeof suffix, " %.1f ", eta);
                if (!result.empty()) object.add(name + std::string(suffix) + key_of(predicted), result.values());
            }
}

void write(const std::vector<float>& values) { fwrite(values.data(), sizeof(float), values.size(), stdout); }

void write_noise(const std::string& name, uint64_t seed, const char* sizes) {
    auto rng = make_rng(name, seed);
    for (const char* size = sizes; size; size = strchr(size, ',') ? strchr(size, ',') + 1 : nullptr)
        write(rng->randn(atoi(size)));
}

void write_libm(const std::string& name) {
    std::vector<float> values(1 << 24);
    for (size_t i = 0; i < values.size(); i++) {
        volatile float uniform = i * (1.0f / (1 << 24));
        float angle            = (2.0f * 3.14159265358979323846f) * uniform;
        values[i]              = name == "log" ? logf(1.0f - uniform) : name == "sin" ? sinf(angle) : cosf(angle);
    }
    write(values);
}

void print_prompt(const char* text) {
    bool first = true;
    for (const auto& [piece, weight] : parse_prompt_attention(text)) {
        printf("%s[\"", first ? "[" : ", ");
        for (unsigned char c : piece) (c < 0x20 || c == '"' || c == '\\') ? printf("\\u%04x", c) : putchar(c);
        printf("\", %.9g]", weight);
        first = false;
    }
    printf("]\n");
}

}  // namespace

int main(int count, char** arguments) {
    std::string what = count > 1 ? arguments[1] : "";
    if (what == "noise" && count == 5) {
        write_noise(arguments[2], strtoull(arguments[3], nullptr, 10), arguments[4]);
    } else if (what == "libm" && count == 3) {
        write_libm(arguments[2]);
    } else if (what == "prompt" && count == 3) {
        print_prompt(arguments[2]);
    } else if (what == "numbers") {
        printf("{");
        print_predictions();
        print_scale();
        print_starts();
        print_schedules();
        print_samplers();
        printf("}\n");
    } else {
        fprintf(stderr, "numbers | noise RNG SEED SIZES | libm FUNCTION | prompt TEXT\n");
        return 2;
    }
    return 0;
}
