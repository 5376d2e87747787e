// NOT EXECUTED: neither compiled nor run where it was written. The counterpart of EdgeModel.java, over the same C functions.
import CEdgelab
import Foundation

/// What the model, the runtime or an argument refuses. `code`: see edge_runtime.h; positive ones are ONNX Runtime's.
public struct EdgeFailure: LocalizedError {
    public let code: Int32
    public let message: String
    public var errorDescription: String? { message }

    init(_ error: EdgeError) {
        code = error.code
        var bytes = error.message
        message = withUnsafeBytes(of: &bytes) { String(decoding: $0.prefix(while: { $0 != 0 }), as: UTF8.self) }
    }

    init(code: Int32, message: String) {
        self.code = code
        self.message = message
    }
}

/// A language model of edgelab: an ONNX file with a key/value cache. Token ids in, logits or token ids out. Any thread may call; calls
/// wait for each other, and a callback of `generate` may not call back.
public final class EdgeModel {
    private let lock = NSLock()
    private var session: OpaquePointer?
    public let vocabulary: Int
    public let context: Int

    /// The model at `path`. `threads` 0: the runtime's choice; `context`: the longest text in tokens.
    public init(path: String, threads: Int32 = 2, context: Int = .max) throws {
        var error = EdgeError()
        guard FileManager.default.fileExists(atPath: path) else { throw CocoaError(.fileNoSuchFile, userInfo: [NSFilePathErrorKey: path]) }
        guard edge_start(nil, &error) != nil, let opened = edge_open(path, threads, &error) else { throw EdgeFailure(error) }
        guard edge_is_language_model(opened, &error) == 1 else {
            edge_close(opened)
            throw EdgeFailure(error)
        }
        session = opened
        vocabulary = Int(edge_vocabulary(opened))
        self.context = context
    }

    deinit { edge_close(session) }

    /// Frees the model's memory; a second time does nothing. Later calls throw.
    public func release() {
        lock.lock()
        defer { lock.unlock() }
        edge_close(session)
        session = nil
    }

    /// Logits [vocabulary] of the token after `ids`, which are read as a text of their own.
    public func predict(_ ids: [Int64]) throws -> [Float] {
        lock.lock()
        defer { lock.unlock() }
        let open = try opened()
        edge_forget(open)
        return try read(open, ids)
    }

    /// Up to `maxNew` tokens after `prompt`, the likeliest each time, one step of the cache each. `onToken` returns whether to go on.
    public func generate(_ prompt: [Int64], maxNew: Int, onToken: (Int64) -> Bool = { _ in true }) throws -> [Int64] {
        lock.lock()
        defer { lock.unlock() }
        let open = try opened()
        edge_forget(open)
        var written: [Int64] = []
        var step = prompt
        while written.count < maxNew && prompt.count + written.count <= context {
            let logits = try read(open, step)
            var best = 0
            for i in 1..<logits.count where logits[i] > logits[best] { best = i }
            written.append(Int64(best))
            if !onToken(Int64(best)) { break }
            step = [Int64(best)]
        }
        return written
    }

    private func opened() throws -> OpaquePointer {
        guard let session else { throw EdgeFailure(code: -5, message: "the model was released; load it again") }
        return session
    }

    private func read(_ open: OpaquePointer, _ ids: [Int64]) throws -> [Float] {
        var error = EdgeError()
        var copy = ids
        guard edge_past(open) + Int64(ids.count) <= Int64(context) else {
            throw EdgeFailure(code: -4, message: "the text has \(edge_past(open) + Int64(ids.count)) tokens; this model reads \(context) at most")
        }
        guard edge_feed(open, &copy, nil, 1, copy.count, &error) == 1 else { throw EdgeFailure(error) }
        var shape = [Int64](repeating: 0, count: 8)
        var rank = 0
        guard let data = edge_output(open, &shape, &rank) else { throw EdgeFailure(code: -2, message: "no logits") }
        return Array(UnsafeBufferPointer(start: data + (Int(shape[1]) - 1) * vocabulary, count: vocabulary))
    }
}

/// Any ONNX net with one float input: numbers in, the first output's numbers out.
public final class EdgeNet {
    private let lock = NSLock()
    private var session: OpaquePointer?

    public init(path: String, threads: Int32 = 1) throws {
        var error = EdgeError()
        guard edge_start(nil, &error) != nil, let opened = edge_open(path, threads, &error) else { throw EdgeFailure(error) }
        session = opened
    }

    deinit { edge_close(session) }

    /// The first output for `input` (row-major) of this shape.
    public func predict(_ input: [Float], shape: [Int64]) throws -> [Float] {
        lock.lock()
        defer { lock.unlock() }
        guard let session else { throw EdgeFailure(code: -5, message: "the net was released; load it again") }
        var error = EdgeError()
        var copy = input
        guard edge_run(session, &copy, copy.count, shape, shape.count, &error) == 1 else { throw EdgeFailure(error) }
        var given = [Int64](repeating: 0, count: 8)
        var rank = 0
        guard let data = edge_output(session, &given, &rank) else { throw EdgeFailure(code: -2, message: "no output") }
        return Array(UnsafeBufferPointer(start: data, count: Int(given.prefix(rank).reduce(1, *))))
    }

    /// Frees the net's memory; a second time does nothing.
    public func release() {
        lock.lock()
        defer { lock.unlock() }
        edge_close(session)
        session = nil
    }
}
