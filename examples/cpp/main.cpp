// classify PACKAGE.pt2 KERNELS.so IMAGE.ppm: the classes of an image, without Python.
//
// The package is written by `vimamba export RUN --format aoti --with-preprocessing --output PACKAGE.pt2`, KERNELS.so is
// what `python -c "from vimamba.ops.cpu import library; print(library.PATH)"` prints, and the image is an RGB one in
// PPM (P6) that has the model's size.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 4) return std::cerr << "usage: classify PACKAGE.pt2 KERNELS.so IMAGE.ppm\n", 2;
  if (!dlopen(argv[2], RTLD_NOW)) return std::cerr << dlerror() << "\n", 1;  // defines the operators vimamba::*

  std::ifstream file(argv[3], std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0, white = 0;
  file >> kind >> width >> height >> white;
  if (kind != "P6" || white != 255) return std::cerr << argv[3] << ": is no PPM of 8 bits a channel\n", 1;
  at::Tensor image = at::empty({1, height, width, 3}, at::kByte);
  file.get();  // the one space behind the header
  file.read(reinterpret_cast<char*>(image.data_ptr<uint8_t>()), image.numel());

  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const at::Tensor scores = model.run({image})[0][0];
  std::cout << model.get_metadata()["class_names"] << "\n";
  for (int64_t i = 0; i < scores.size(0); ++i) std::cout << i << " " << scores[i].item<float>() << "\n";
}
