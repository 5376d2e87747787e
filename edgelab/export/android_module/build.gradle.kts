// An Android library. In settings.gradle.kts write include(":edgelab"), in the app's build.gradle.kts implementation(project(":edgelab")).
plugins {
    id("com.android.library")
}

android {
    namespace = "dev.edgelab"
    compileSdk = 35

    defaultConfig {
        minSdk = 24 // what ONNX Runtime's AAR asks for; the Java code itself uses nothing newer
        consumerProguardFiles("consumer-rules.pro")
        ndk {
            abiFilters += listOf("arm64-v8a", "armeabi-v7a", "x86_64") // the last is the emulator's
        }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }

    externalNativeBuild {
        cmake {
            path = file("src/main/cpp/CMakeLists.txt")
        }
    }

    packaging {
        jniLibs.excludes += "**/libonnxruntime4j_jni.so" // the runtime's own Java binding, which is not used here
    }
}

dependencies {
    // brings libonnxruntime.so for each ABI; libedgelab.so opens it by that name
    implementation("com.microsoft.onnxruntime:onnxruntime-android:__ORT_VERSION__")
}
