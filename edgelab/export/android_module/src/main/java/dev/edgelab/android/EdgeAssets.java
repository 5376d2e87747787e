package dev.edgelab.android;

import android.content.Context;
import dev.edgelab.EdgeFiles;
import java.io.File;
import java.io.IOException;

/** The model's files, out of the app's assets into a folder that ONNX Runtime can open. The one class here that needs Android. */
public final class EdgeAssets {
  private EdgeAssets() {}

  /**
   * The folder for {@link dev.edgelab.EdgeChat#open(File)}. The first call of an app's version copies the assets there (seconds for a
   * large model: not on the main thread), each file checked against its sha256; later calls find it.
   *
   * @throws IOException when the disk is full, or when an asset is not what the manifest says
   */
  public static File install(Context context) throws IOException {
    return EdgeFiles.install(name -> context.getAssets().open("edgelab/" + name), new File(context.getNoBackupFilesDir(), "edgelab"));
  }
}
