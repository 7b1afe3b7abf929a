def open_coco(name, opening):
    raise NotImplementedError


def write_coco(*a):
    raise NotImplementedError
