// Image files made ready to be shown and kept: checked, and scaled down where they are larger than a model sees. The server has
// limits of its own.

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
/// Bytes of a file that is read at all.
const FILE_BYTES = 64 * 2 ** 20;
/// Pixels of a longer side that is kept.
const SIDE = 2048;
/// Bytes of an image that is kept as it is.
const KEPT_BYTES = 2 * 2 ** 20;

/// Why a file is not taken: `key` and `values` of the words for it.
export class Refusal extends Error {
  constructor(key, values) {
    super(key);
    Object.assign(this, { key, values });
  }
}

/// The image of a file: { name, url, width, height, from }, `from` being its own sides where it was scaled down.
export async function picture(file) {
  if (!TYPES.includes(file.type)) throw new Refusal("notAnImage", { name: file.name });
  if (file.size > FILE_BYTES) throw new Refusal("imageTooLarge", { name: file.name, size: file.size, limit: FILE_BYTES });
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Refusal("imageBroken", { name: file.name });
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, SIDE / Math.max(width, height));
  if (scale === 1 && file.size <= KEPT_BYTES) {
    bitmap.close();
    return { name: file.name, url: await dataUrl(file), width, height };
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  // What is transparent would be black in a JPEG.
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  const sides = { width: canvas.width, height: canvas.height };
  return { name: file.name, url: await dataUrl(blob), ...sides, from: { width, height } };
}

/// Bytes that images take where they are kept.
export const bytes = (images) => images.reduce((sum, { url }) => sum + url.length, 0);

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
