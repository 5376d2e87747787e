package dev.edgelab;

import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.Map;

/** Copies a model's folder, whole or not at all, each file checked against the sha256 that files.json states. */
public final class EdgeFiles {
  private EdgeFiles() {}

  /** Where files come from: an app's assets, a folder, a download. */
  public interface Source {
    InputStream open(String name) throws IOException;
  }

  /**
   * The folder below {@code parent} that holds the model of {@code source}. Its name is the sha256 of files.json, so another version is
   * another folder: it is copied under a temporary name and renamed when whole, and then the older ones are removed.
   *
   * @throws IOException when a file is not what files.json says, or cannot be written; nothing half-copied is left under the name
   */
  public static synchronized File install(Source source, File parent) throws IOException {
    ByteArrayOutputStream list = new ByteArrayOutputStream();
    String digest = copy(source.open("files.json"), list);
    File place = new File(parent, digest.substring(0, 16));
    if (place.isDirectory()) return place;
    File work = new File(parent, digest.substring(0, 16) + ".tmp");
    remove(work);
    if (!work.mkdirs()) throw new IOException("cannot make the folder " + work);
    try {
      for (Map.Entry<String, Object> file : Json.map(Json.map(Json.read(list.toString("UTF-8"))).get("files")).entrySet()) {
        String name = file.getKey(), wanted = Json.string(Json.map(file.getValue()).get("sha256"));
        if (name.contains("/") || name.contains("\\") || name.startsWith(".")) throw new IOException("files.json names the file " + name);
        try (FileOutputStream out = new FileOutputStream(new File(work, name))) {
          String found = copy(source.open(name), out);
          if (!found.equals(wanted)) throw new IOException(name + " has the sha256 " + found + "; files.json states " + wanted);
          out.getFD().sync();
        }
      }
      if (!work.renameTo(place)) throw new IOException("cannot rename " + work + " to " + place);
    } finally {
      remove(work);
    }
    File[] others = parent.listFiles();
    if (others != null) for (File other : others) if (!other.equals(place)) remove(other);
    return place;
  }

  /** Copies and closes {@code in}; returns the sha256 in hexadecimal. */
  private static String copy(InputStream in, java.io.OutputStream out) throws IOException {
    try (InputStream from = in) {
      MessageDigest digest = MessageDigest.getInstance("SHA-256");
      byte[] some = new byte[1 << 16];
      for (int n; (n = from.read(some)) > 0; ) {
        digest.update(some, 0, n);
        out.write(some, 0, n);
      }
      StringBuilder hex = new StringBuilder();
      for (byte b : digest.digest()) hex.append(Character.forDigit(b >> 4 & 15, 16)).append(Character.forDigit(b & 15, 16));
      return hex.toString();
    } catch (NoSuchAlgorithmException e) {
      throw new IOException(e);
    }
  }

  private static void remove(File file) {
    File[] inside = file.listFiles();
    if (inside != null) for (File f : inside) remove(f);
    file.delete();
  }
}
