"""Data sets: real first, never silently something else.

Each function looks for verified local files, then downloads with the official loader, then makes an offline
stand-in, prints which it was, and says so in the result's `.provenance`:

    small_images    cifar10(), mnist()
    photos          imagenet_photos(count, prefer)
    tiny_imagenet   tiny_imagenet(split, limit), without a stand-in
    ppi             ppi()
"""
