"""Builds the C++ (and, where nvcc is, CUDA) extension through CMake, and maps kernels/ to exaonepath.kernels.

Without a working compiler the package still installs: the extension is left out, the torch backends serve, and
`exaonepath doctor` says so. Set EXAONEPATH_REQUIRE_EXTENSION=1 to make a failed build an error (CI does).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        required = os.environ.get("EXAONEPATH_REQUIRE_EXTENSION") == "1"
        try:
            try:
                self._cmake(target)
            except subprocess.CalledProcessError as exc:
                if required:
                    raise
                # An nvcc that does not get on with this compiler should not take the CPU half with it.
                print(f"warning: {exc}; building the extension again without CUDA", file=sys.stderr)
                self._cmake(target, "-DEXAONEPATH_CUDA=OFF")
        except (ImportError, OSError, subprocess.CalledProcessError) as exc:
            if required:
                raise
            print(f"warning: the C++ extension was not built ({exc}); the torch backends will serve", file=sys.stderr)
            self._skipped = True

    def _cmake(self, target: Path, *options: str) -> None:
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake is not on the PATH")
        build_dir = Path(self.build_temp).resolve() / "cmake"
        # A cache left by another interpreter or build environment points at files that are gone.
        shutil.rmtree(build_dir, ignore_errors=True)
        build_dir.mkdir(parents=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir),
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DEXAONEPATH_OUTPUT_DIR={target.parent}",
            f"-DEXAONEPATH_VERSION={self.distribution.get_version()}",
            *options,
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([cmake, "--build", str(build_dir), "--target", "_C"], check=True)
        if not target.is_file():
            raise FileNotFoundError(f"CMake finished without making {target}")

    def copy_extensions_to_source(self) -> None:
        if not getattr(self, "_skipped", False):
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [] if getattr(self, "_skipped", False) else super().get_outputs()

    def get_output_mapping(self) -> dict[str, str]:
        return {} if getattr(self, "_skipped", False) else super().get_output_mapping()


setup(
    packages=[*find_packages(include=["exaonepath", "exaonepath.*"]), "exaonepath.kernels"],
    package_dir={"exaonepath.kernels": "kernels"},
    package_data={"": ["*.pyi"], "exaonepath": ["py.typed"], "exaonepath.viewer": ["page/*", "page/vendor/*"]},
    ext_modules=[Extension("exaonepath._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
