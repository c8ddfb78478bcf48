// Runs a bundle's plan once from C++, without Python: every input zeros at the smallest shape of the first profile.
//
//   g++ -std=c++17 run_plan.cpp -o run_plan -I$TENSORRT/include -I/usr/local/cuda/include \
//       -L$TENSORRT/lib -lnvinfer -L/usr/local/cuda/lib64 -lcudart
//   ./run_plan bundles/vit-fp16/engines/tensorrt.plan
//
// For a plan of TensorRT-RTX link -ltensorrt_rtx in place of -lnvinfer. bundle.json beside the plan has the tensors'
// meaning, and the SHA-256 that an application should compare before it loads a file it did not build.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", message);
        }
    }
};

std::size_t bytesOf(nvinfer1::DataType type) {
    switch (type) {
    case nvinfer1::DataType::kINT64: return 8;
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32: return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16: return 2;
    default: return 1;
    }
}

std::size_t elementsOf(nvinfer1::Dims const& shape) {
    std::size_t count = 1;
    for (int axis = 0; axis < shape.nbDims; ++axis) {
        count *= static_cast<std::size_t>(shape.d[axis]);
    }
    return count;
}

int failed(char const* what) {
    std::fprintf(stderr, "run_plan: %s\n", what);
    return 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        return failed("expected one argument, the path of a plan");
    }
    std::ifstream file(argv[1], std::ios::binary);
    std::vector<char> const plan((std::istreambuf_iterator<char>(file)), {});
    if (plan.empty()) {
        return failed("the plan cannot be read");
    }
    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> const runtime(nvinfer1::createInferRuntime(logger));
    std::unique_ptr<nvinfer1::ICudaEngine> const engine(
        runtime ? runtime->deserializeCudaEngine(plan.data(), plan.size()) : nullptr);
    std::unique_ptr<nvinfer1::IExecutionContext> const context(engine ? engine->createExecutionContext() : nullptr);
    cudaStream_t stream{};
    if (!context || cudaStreamCreate(&stream) != cudaSuccess) {
        return failed("the plan is for another GPU or version; the lines above say which");
    }

    std::map<std::string, void*> buffers;
    auto const allocate = [&](std::string const& name, std::size_t bytes) {
        void* memory = nullptr;
        if (cudaMalloc(&memory, bytes) != cudaSuccess || cudaMemset(memory, 0, bytes) != cudaSuccess) {
            return false;
        }
        buffers[name] = memory;
        return context->setTensorAddress(name.c_str(), memory);
    };
    for (int index = 0; index < engine->getNbIOTensors(); ++index) {
        char const* name = engine->getIOTensorName(index);
        if (engine->getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT) {
            continue;
        }
        auto const shape = engine->getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMIN);
        if (!context->setInputShape(name, shape)
            || !allocate(name, elementsOf(shape) * bytesOf(engine->getTensorDataType(name)))) {
            return failed(name);
        }
    }
    for (int index = 0; index < engine->getNbIOTensors(); ++index) {
        char const* name = engine->getIOTensorName(index);
        if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT) {
            continue;
        }
        char const* written = engine->getAliasedInputTensor(name);  // a KV cache: output and input are one buffer
        auto const bytes = elementsOf(context->getTensorShape(name)) * bytesOf(engine->getTensorDataType(name));
        bool const bound = written ? context->setTensorAddress(name, buffers.at(written)) : allocate(name, bytes);
        if (!bound) {
            return failed(name);
        }
    }
    if (!context->enqueueV3(stream) || cudaStreamSynchronize(stream) != cudaSuccess) {
        return failed("the engine did not run");
    }
    for (auto const& [name, memory] : buffers) {
        if (engine->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kOUTPUT
            && engine->getTensorDataType(name.c_str()) == nvinfer1::DataType::kFLOAT) {
            float first = 0;
            cudaMemcpy(&first, memory, sizeof first, cudaMemcpyDeviceToHost);
            std::printf("%s[0] = %g\n", name.c_str(), first);
        }
        cudaFree(memory);
    }
    cudaStreamDestroy(stream);
    return 0;
}
