"""From images, series and volumes to tokens on a grid."""
