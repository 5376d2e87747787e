// swift-tools-version:5.9
// NOT EXECUTED: this package was written beside the Android module and has been neither compiled nor run. The C code in Sources/CEdgelab
// is the Android module's, which edgelab's verification compiles and runs on a JVM.
import PackageDescription

let package = Package(
    name: "Edgelab",
    platforms: [.iOS(.v15), .macOS(.v13)],
    products: [.library(name: "Edgelab", targets: ["Edgelab"])],
    dependencies: [
        // ONNX Runtime's own package; take the release next to __ORT_VERSION__, which the model file was verified with
        .package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", from: "1.20.0")
    ],
    targets: [
        .target(
            name: "CEdgelab",
            dependencies: [.product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")],
            cSettings: [.define("EDGE_ORT_LINKED")]  // the runtime is linked in, not opened by name
        ),
        .target(name: "Edgelab", dependencies: ["CEdgelab"]),
    ]
)
