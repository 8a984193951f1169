"""The graph of a TFLite model, read and changed in its flatbuffer."""
